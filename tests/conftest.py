"""Fixtures for all tests, and what tests need of the machine."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from guests import KERNEL, Guests
from hypothesis import settings
from mounting import Mounts
from nbdservers import Servers
from slowhost import SlowHost, build

# Under CI pytest works out the whole difference of values that are not equal, which of disks takes it hours. So it is
# not told; workers, which inherit the environment, are told by a name of our own.
if os.environ.pop("CI", None) or os.environ.pop("BUILD_NUMBER", None):
    os.environ["COWFS_CI"] = "1"
_UNDER_CI = "COWFS_CI" in os.environ
# A test run in the background of a shell ignores Ctrl-C, and so would all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if _UNDER_CI:
    settings.load_profile("ci")

#: what ``@pytest.mark.needs`` can ask for beside programs: name, how to tell
_CONDITIONS = {
    "root": lambda: os.geteuid() == 0,
    "fuse": lambda: Path("/dev/fuse").exists(),
    "loop": lambda: Path("/dev/loop-control").exists(),
    "autofs": lambda: "autofs" in Path("/proc/filesystems").read_text(),
    "guest-kernel": (KERNEL / "md").exists,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*things): root, fuse, loop, autofs, guest-kernel, or programs that the test calls"
    )
    seconds = os.environ.get("COWFS_SLOW_DISK")
    if seconds and "COWFS_SLOW_HOST" not in os.environ:
        _slow_down(config, float(seconds))


def _slow_down(config: pytest.Config, seconds: float) -> None:
    """Have all that this process starts, the workers too, wait so long at most at each fsync."""
    directory = Path(tempfile.mkdtemp(prefix="cowfs-slow-disk-"))
    config.add_cleanup(lambda: shutil.rmtree(directory))
    # of tests that are other users, too
    directory.chmod(0o755)
    host = SlowHost(build(directory), directory)
    host.flushes.behaves(delay=seconds)
    os.environ.update(host.environment)


def pytest_runtest_setup(item: pytest.Item) -> None:
    things = [thing for marker in item.iter_markers("needs") for thing in marker.args]
    missing = [thing for thing in things if not _CONDITIONS.get(thing, lambda name=thing: shutil.which(name))()]
    if missing and _UNDER_CI:
        pytest.fail(f"this machine lacks {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name what failed at once, for whoever looks at a run that does not come to its end."""
    if report.failed and _UNDER_CI and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stdout.write(f"\n{report.nodeid} failed in {report.when}:\n{report.longreprtext[-2000:]}\n")
        sys.stdout.flush()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounts]:
    """Make mounts that are gone after the test, however it ends."""
    mounts = Mounts(tmp_path)
    try:
        yield mounts
    finally:
        mounts.clean_up()


@pytest.fixture(scope="session")
def slow_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes the host of a server slow."""
    return build(tmp_path_factory.mktemp("slow"))


@pytest.fixture
def slow_host(slow_library: Path, tmp_path: Path, mount: Mounts) -> Iterator[SlowHost]:
    """The host of mounts that are made behind its ``prefix``; holds nothing up any more when they are taken away."""
    host = SlowHost(slow_library, tmp_path)
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def guests(mount: Mounts, tmp_path: Path) -> Iterator[Guests]:
    """Start virtual machines that are gone before the mount under them is taken away."""
    started = Guests(tmp_path)
    try:
        yield started
    finally:
        started.clean_up()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Start NBD servers that are gone after the test, however it ends."""
    made = Servers(tmp_path)
    try:
        yield made
    finally:
        made.clean_up()


@pytest.fixture
def raw_image(tmp_path: Path) -> Path:
    """A raw image of 16 MiB that is not all zeros."""
    path = tmp_path / "plain.img"
    path.write_bytes(os.urandom(1 << 20) + bytes(14 << 20) + os.urandom(1 << 20))
    return path


@pytest.fixture(params=["qcow2", "qed"])
def overlay(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An overlay of 64 MiB, nothing in it yet, over a raw base of random bytes."""
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(64 << 20))
    path = tmp_path / f"overlay.{request.param}"
    ok(qemu_img("create", "-q", "-f", request.param, "-b", base, "-F", "raw", path))
    return path

"""The requests that pyfuse3 does not pass on: that they arrive, that they are still lacking, and life without them."""

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pyfuse3
import pytest
from fallocating import PUNCH_HOLE, fallocate
from mounting import Mounted, Mounts, shell, wait_for, wait_for_end

from cowfs.fuse import shim
from cowfs.fuse.shim.requests import Requests

pytestmark = [pytest.mark.needs("root", "fuse")]

MIB = 1 << 20


def test_it_was_built_and_can_be_loaded() -> None:
    assert isinstance(shim.load(), ctypes.CDLL), "scripts/setup builds it"


def test_pyfuse3_still_lacks_the_calls() -> None:
    assert not [name for name in shim.ADDED if hasattr(pyfuse3.Operations, name)], "cowfs/fuse/shim can go"


def test_the_calls_arrive(mount: Mounts, raw_image: Path, tmp_path: Path) -> None:
    """Fails if pyfuse3 or libfuse no longer do what the shim relies on."""
    log = tmp_path / "log"
    mounted = mount("-o", f"log={log}", raw_image)
    descriptor = os.open(mounted.flat("plain"), os.O_RDWR)
    fallocate(descriptor, PUNCH_HOLE, 0, 65_536)
    assert os.lseek(descriptor, 0, os.SEEK_DATA) == 65_536
    os.close(descriptor)
    assert "no discards" not in log.read_text()
    assert mounted.control("plain", "stats").read_text().count("discards: 1\n") == 1


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [
        (
            "import importlib.machinery; importlib.machinery.EXTENSION_SUFFIXES.clear()",
            "cowfs was built without a C compiler",
        ),
        ("import pyfuse3", "pyfuse3 does not call libfuse as it did"),
    ],
)
def test_a_mount_without_them(mount: Mounts, raw_image: Path, tmp_path: Path, prelude: str, reason: str) -> None:
    data = raw_image.read_bytes()
    log, point = tmp_path / "log", mount.new_point()
    code = f"{prelude}; from cowfs.cli.main import main; main()"
    made = shell(f'{sys.executable} -c "{code}" mount -o log={log} {raw_image} {point}')
    assert (made.returncode, made.stderr) == (0, "")
    mounted = Mounted(point)
    assert f"no discards and holes, except through .cowfs: {reason}" in " ".join(log.read_text().split())
    flat = mounted.flat("plain")
    assert flat.read_bytes() == data
    descriptor = os.open(flat, os.O_RDWR)
    with pytest.raises(OSError, match="not supported"):
        fallocate(descriptor, PUNCH_HOLE, 0, 65_536)
    assert os.lseek(descriptor, 0, os.SEEK_HOLE) == len(data), "as on any file system that knows no holes"
    os.close(descriptor)
    mounted.control("plain", "discard").write_text("4k 64K")
    assert flat.read_bytes() == data[:4096] + bytes(65_536) + data[4096 + 65_536 :]
    mounted.umount()
    wait_for_end(mounted.process)
    os.close(mounted.process)


def test_callers_that_wait_when_the_mount_ends_get_an_answer(mount: Mounts, raw_image: Path) -> None:
    """Whether that comes from the handler that is cancelled or from the kernel."""
    mounted = mount(raw_image)
    code = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "print('go', flush=True)\n"
        "try:\n"
        "    while True:\n"
        "        os.lseek(fd, 0, os.SEEK_HOLE)\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, mounted.flat("plain")], stdout=subprocess.PIPE, text=True
    ) as seeker:
        assert seeker.stdout is not None
        assert seeker.stdout.readline() == "go\n"
        wait_for("the seeker to have the file open", lambda: bool(mounted.status()["images"][0]["open-files"]))
        shell(f"umount -l {mounted.point}; kill {mounted.pid}")
        wait_for_end(mounted.process)
        assert int(seeker.stdout.read()) in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)


def test_a_request_that_cannot_be_started_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Handlers:
        async def fallocate(self, fh: int, offset: int, length: int, mode: int) -> None: ...

        async def lseek(self, fh: int, offset: int, whence: int) -> int:
            return 0

    requests = Requests(Handlers())
    answers: list[tuple[object, ...]] = []
    monkeypatch.setattr(requests, "_reply", lambda *answer: answers.append(answer))
    requests._on_lseek(7, 2, 3, 0, os.SEEK_DATA)
    assert answers == [(7, errno.EIO)]
    assert "internal error" in caplog.text

"""``cowfs job``, ``add`` and ``remove``, and what is seen of a job on a terminal, with real mounts."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest
from commandline import PATIENCE, cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounted, Mounts, shell, wait_for

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img", "qemu-io")]

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three layers of 8 MiB with something in each: base.raw, middle.qcow2, vm.qcow2."""
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle.qcow2", "vm.qcow2"))
    base.write_bytes(os.urandom(SIZE))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top))
    qemu_io(middle, "qcow2", "write -P 2 1M 1M")
    qemu_io(top, "qcow2", "write -P 3 1536k 1M")
    return top


def clone(base: Path, name: str) -> Path:
    """An overlay with nothing in it, beside its base."""
    path = base.with_name(f"{name}.qcow2")
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path))
    return path


def stop_stream(mounted: Mounted, name: str, state: str = "cancelled") -> None:
    mounted.control(name, "stream").write_text("cancel")
    assert mounted.job(name, "stream")["state"] == state


# -- job


def test_an_active_job_is_shown_and_steered_whatever_it_is(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    flat = mounted.flat("vm")
    assert ok(cowfs("job", flat)) == "job: none\n"
    assert "no job is active on this disk" in refusal(cowfs("job", flat, "pause"))
    ok(cowfs("stream", "--no-wait", "--speed", "64k", flat))
    shown = ok(cowfs("job", flat)).splitlines()
    assert shown[:2] == ["job: stream", "state: running"]
    assert [line.split(":")[0] for line in shown[1:]] == list(mounted.job("vm", "stream"))
    assert ok(cowfs("job", flat, "pause")) == ""
    assert mounted.job("vm", "stream")["state"] == "paused"
    assert "cannot pause a stream job that is paused" in refusal(cowfs("job", flat, "pause"))
    assert ok(cowfs("job", flat, "speed=1.5M")) == ""
    assert mounted.job("vm", "stream")["speed"] == str(3 * MIB // 2)
    assert ok(cowfs("job", flat, "resume")) == ""
    assert ok(cowfs("job", flat, "cancel")) == ""
    assert mounted.job("vm", "stream")["state"] == "cancelled"
    ok(cowfs("commit", "--no-wait", "--speed", "1k", flat))
    # the stream that has ended is history now
    assert ok(cowfs("job", flat)).startswith("job: commit\nstate: running\n")
    facts = json.loads(ok(cowfs("job", "--json", flat)))
    assert [(job["name"], job["job"], job["state"]) for job in facts] == [
        ("vm", "commit", "running"),
        ("vm", "stream", "cancelled"),
    ]
    ok(cowfs("job", flat, "cancel"))
    assert ok(cowfs("job", flat)).count("state: cancelled\n") == 2


def test_a_job_can_be_waited_for_again(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    flat = mounted.flat("vm")
    ok(cowfs("stream", "--no-wait", "--speed", "1k", flat))
    waiter = subprocess.Popen(
        [sys.executable, "-m", "cowfs", "job", flat, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert waiter.stdout is not None
    assert waiter.stdout.readline().startswith("stream: running")
    ok(cowfs("job", flat, "speed=0"))
    output, errors = waiter.communicate(timeout=PATIENCE)
    assert (waiter.returncode, errors) == (0, "")
    assert output.endswith("stream: completed, 100.0 % of 8 MiB\n")
    # who comes late learns of the outcome as well
    assert ok(cowfs("job", flat, "wait")) == "stream: completed, 100.0 % of 8 MiB\n"


def test_who_waits_for_a_job_that_is_over_gets_the_outcome_of_the_last(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    flat = mounted.flat("vm")
    assert "no job has been started on this disk" in refusal(cowfs("job", flat, "wait"))
    for verb in ("stream", "commit", "stream"):
        ok(cowfs(verb, "--no-wait", "--speed", "1k", flat))
        ok(cowfs("job", flat, "cancel"))
        assert refusal(cowfs("job", "-q", flat, "wait")).endswith(f": the {verb} job was cancelled")


def test_the_outcome_of_a_job_is_that_of_who_waits(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    flat = mounted.flat("vm")
    ok(cowfs("stream", "--no-wait", "--speed", "1k", flat))
    waiter = subprocess.Popen(
        [sys.executable, "-m", "cowfs", "job", "-q", flat, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # it has the file open once it follows
    wait_for("somebody to follow", lambda: _has_open(waiter.pid, mounted.control("vm", "stream")))
    stop_stream(mounted, "vm")
    output, errors = waiter.communicate(timeout=PATIENCE)
    assert (waiter.returncode, output) == (1, "")
    assert errors == f"cowfs: {flat}: the stream job was cancelled\n"


def _has_open(process: int, path: Path) -> bool:
    links = list(Path(f"/proc/{process}/fd").iterdir())
    return any(os.path.lexists(link) and os.readlink(link) == str(path) for link in links)  # noqa: PTH115


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    assert shell(f"mount -t tmpfs -o size=4m tmpfs {folder}").returncode == 0
    yield folder
    shell(f"umount -l {folder}")


def test_a_job_that_fails_or_stops_says_why(small: Path, mount: Mounts, chain: Path) -> None:
    overlay = small / "over.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", chain, "-F", "qcow2", overlay))
    mounted = mount("-o", "no-copy-on-read", overlay)
    flat = mounted.flat("over")
    for words, says in (([], "failed"), (["--on-error", "stop"], "is paused until it is resumed")):
        failed = cowfs("stream", *words, flat)
        assert failed.returncode == 1
        assert (
            failed.stderr == f"cowfs: {flat}: the stream job {says}: {overlay}: cannot write: No space left on device\n"
        )
        assert f"error: {overlay}: cannot write: No space left" in ok(cowfs("job", flat))
    assert "No space left" in cowfs("job", flat, "wait").stderr
    assert shell(f"mount -o remount,size=64m {small}").returncode == 0
    ok(cowfs("job", flat, "resume"))
    assert mounted.job_ended("over", "stream")["state"] == "completed"


def test_jobs_of_all_disks_in_a_table(mount: Mounts, chain: Path) -> None:
    base = chain.with_name("base.raw")
    mounted = mount(chain, clone(base, "long-name"), clone(base, "idle"))
    assert ok(cowfs("job", mounted.point)).split() == ["NAME", "JOB", "STATE", "DONE", "OF", "RATE", "LEFT", "ERROR"]
    ok(cowfs("stream", "--no-wait", "--speed", "1k", mounted.flat("vm")))
    ok(cowfs("stream", "-q", mounted.flat("long-name")))
    rows = [line.split() for line in ok(cowfs("job", mounted.point)).splitlines()[1:]]
    assert [row[:3] for row in rows] == [["vm", "stream", "running"], ["long-name", "stream", "completed"]]
    assert rows[1][3:7] == ["100.0", "%", "8", "MiB"]
    jobs = json.loads(ok(cowfs("job", mounted.point, "--json")))
    assert [(job["name"], job["state"]) for job in jobs] == [("vm", "running"), ("long-name", "completed")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{flat}", "stop"], "'stop' is not one of show, pause, resume, cancel, complete, wait, speed=SIZE"),
        (["{flat}", "speed=fast"], "'fast' is not a size"),
        (["{flat}", "complete"], "cannot complete|cannot be completed"),
        (["{point}", "pause"], "name the disk whose job is meant to pause"),
        (["{point}/other"], "there is no such disk in the mount"),
        (["/tmp"], "does not lie in a cowfs mount"),
    ],
)
def test_what_cannot_be_done_is_one_line(mount: Mounts, chain: Path, words: list[str], says: str) -> None:
    mounted = mount(chain)
    ok(cowfs("stream", "--no-wait", "--speed", "1k", mounted.flat("vm")))
    given = [word.format(flat=mounted.flat("vm"), point=mounted.point) for word in words]
    assert re.search(says, refusal(cowfs("job", *given)))


# -- on a terminal


class Terminal:
    """A command on a terminal of its own, and all that it has written there."""

    def __init__(self, *words: str | Path) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        command = [sys.executable, "-m", "cowfs", *map(str, words)]
        self.process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment)
        os.close(slave)
        self._data = b""
        self.text = ""

    def read_until(self, done: Callable[[str], object]) -> None:
        """Read until ``done`` accepts what there is, or the command has ended and there is no more."""
        deadline = monotonic() + PATIENCE
        while not done(self.text):
            assert monotonic() < deadline, self.text
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:
                    # the command has let go of its side
                    return
                # what is read may end in the middle of a character, or of an escape sequence
                self._data += data
                text = self._data.decode(errors="ignore")
                self.text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)

    def end(self) -> int:
        """Read to the end; the exit code."""
        self.read_until(lambda text: False)
        return self.process.wait(timeout=PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(*words: str | Path) -> Iterator[Terminal]:
    made = Terminal(*words)
    try:
        yield made
    finally:
        made.close()


def test_the_bar_has_bytes_rate_and_time_left_and_ctrl_c_leaves_the_job_running(mount: Mounts, chain: Path) -> None:
    mounted = mount("-o", "no-copy-on-read", chain)
    flat = mounted.flat("vm")
    with terminal("stream", "--speed", "512k", flat) as seen:
        seen.read_until(lambda text: re.search(r"stream +\S+ +[1-9][\d.]*/8\.0 MiB +\d+ KiB/s +\d+ s left", text))
        ok(cowfs("job", flat, "pause"))
        seen.read_until(lambda text: "stream (paused)" in text)
        ok(cowfs("job", flat, "speed=1k"))
        ok(cowfs("job", flat, "resume"))
        seen.process.send_signal(signal.SIGINT)
        assert seen.end() == 130
        last = seen.text.splitlines()[-1]
        for word in ("The stream job goes on", f"cowfs job {flat} wait", "pause|resume|speed=SIZE", "cancel"):
            assert word in seen.text.replace("\r\n", "")[-400:], last
    assert mounted.job("vm", "stream")["state"] == "running"
    before = int(mounted.job("vm", "stream")["offset"])
    ok(cowfs("job", flat, "speed=0"))
    assert mounted.job_ended("vm", "stream")["state"] == "completed"
    assert before < SIZE
    with terminal("job", flat, "wait") as again:
        assert again.end() == 0
        assert "8.0/8.0 MiB" in again.text


# -- add and remove


def test_images_are_added_and_removed(mount: Mounts, chain: Path, tmp_path: Path) -> None:
    base = chain.with_name("base.raw")
    mounted = mount(chain)
    first, second = clone(base, "first"), clone(base, "second")
    assert ok(cowfs("add", mounted.point, "first.qcow2", f"other={second}", cwd=tmp_path)) == ""
    assert mounted.flat("first").read_bytes() == base.read_bytes() == mounted.flat("other").read_bytes()
    with open(mounted.flat("first"), "r+b") as file:
        file.write(b"x" * 4096)
    assert mounted.flat("other").read_bytes() == base.read_bytes()
    assert ok(cowfs("remove", mounted.flat("first"), "mount0/other", cwd=tmp_path)) == ""
    assert sorted(os.listdir(mounted.point)) == [".cowfs", "vm"]  # noqa: PTH208
    for image in (first, second):
        assert qemu_img("check", image).returncode == 0
    qemu_io(first, "qcow2", "read -P 120 0 4096")


def test_added_read_only_and_with_a_format(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    # as raw, the image shows its own header
    assert ok(cowfs("add", "-r", "-f", "raw", mounted.point, f"it={clone(chain.with_name('base.raw'), 'a')}")) == ""
    assert mounted.flat("it").read_bytes()[:4] == b"QFI\xfb"
    assert mounted.flat("it").stat().st_mode & 0o222 == 0
    assert "Read-only" in shell(f"dd if=/dev/zero of={mounted.flat('it')} bs=512 count=1 conv=notrunc").stderr


@pytest.mark.parametrize("name", ["disk ro", "disk format=raw", "ro", "a -- b", "x=y", "-- z"])
def test_a_file_name_is_never_taken_for_an_option(mount: Mounts, chain: Path, tmp_path: Path, name: str) -> None:
    mounted = mount(chain)
    path = clone(chain.with_name("base.raw"), "plain").rename(tmp_path / name)
    assert ok(cowfs("add", "--", mounted.point, path)) == ""
    (served,) = [image for image in mounted.status()["images"] if image["name"] == name]
    assert served["file"] == str(path)
    assert served["format"] == "qcow2"
    assert not served["read-only"]
    assert ok(cowfs("remove", "--", mounted.flat(name))) == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add", "{point}", "{image}"], "there is a disk 'vm' already"),
        (["add", "{point}", "x={image}"], "is part of the disk 'vm'"),
        (["add", "{point}", "/none/x.raw"], "/none/x.raw: cannot open: No such file or directory"),
        (["add", "{point}", "a/b=/none/x"], "a/b=/none/x"),
        (["add", "{point}", "x="], "cannot be written to a control file"),
        (["add", "{point}", "{image} "], "cannot be written to a control file"),
        (["add", "-f", "vmdk", "{point}", "{image}"], "unknown format 'vmdk'"),
        (["add", "/tmp", "{image}"], "/tmp: is not the mount point of a cowfs mount"),
        (["remove", "{point}/vm"], "a stream job is active on 'vm'; cancel it first"),
        (["remove", "{point}/none"], "there is no such disk in the mount"),
        (["remove", "{point}"], "is no disk of the mount"),
        (["remove", "{image}"], "does not lie in a cowfs mount"),
    ],
)
def test_what_is_refused_says_why(mount: Mounts, chain: Path, words: list[str], says: str) -> None:
    mounted = mount(chain)
    ok(cowfs("stream", "--no-wait", "--speed", "1k", mounted.flat("vm")))
    line = refusal(cowfs(*(word.format(point=mounted.point, image=chain) for word in words)))
    assert says in line
    assert [image["name"] for image in mounted.status()["images"]] == ["vm"]


def test_a_disk_that_is_open_stays(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    with open(mounted.flat("vm"), "rb"):
        assert refusal(cowfs("remove", mounted.flat("vm"))) == f"{mounted.flat('vm')}: 'vm' is open"
    assert ok(cowfs("remove", mounted.flat("vm"))) == ""


def test_a_mount_that_is_read_only_takes_no_images(mount: Mounts, chain: Path) -> None:
    mounted = mount("-o", "ro", chain)
    line = refusal(cowfs("add", mounted.point, clone(chain.with_name("base.raw"), "more")))
    assert line == f"{mounted.point}/.cowfs/control: cannot write: Read-only file system"

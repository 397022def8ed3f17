"""Real mounts, used with the tools that people use."""

import hashlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import PATIENCE, cowfs, ok, qemu_img, refusal
from mounting import Mounted, Mounts, shell, wait_for, wait_for_end

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img")]

MIB = 1 << 20
_PYTHON = [sys.executable, "-m", "cowfs"]


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(image: Path) -> bytes:
    """What QEMU says the disk of an image holds."""
    out = image.with_suffix(".content")
    ok(qemu_img("convert", "-O", "raw", image, out))
    return out.read_bytes()


def assert_sound(image: Path) -> None:
    assert qemu_img("check", image).returncode == 0, qemu_img("check", image)


# -- what is there


def test_a_raw_image(mount: Mounts, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    flat = mounted.flat("plain")
    assert flat.read_bytes() == data
    assert flat.stat().st_size == len(data)
    with open(flat, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"through the mount")
        file.flush()
        os.fsync(file.fileno())
    assert raw_image.read_bytes()[5 * MIB :][:17] == b"through the mount"
    mounted.umount()
    wait_for_end(mounted.process)
    assert not list(mounted.point.iterdir())


def test_mountinfo_and_space(mount: Mounts, overlay: Path) -> None:
    mounted = mount("-o", "ro,noatime", overlay)
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(mounted.point) in line]
    assert " - fuse.cowfs " in line
    options = line.split(" ")[5].split(",")
    assert {"ro", "noatime"} <= set(options)
    assert os.statvfs(mounted.point).f_bsize == 65536


def test_several_chains_at_once(mount: Mounts, overlay: Path, raw_image: Path) -> None:
    mounted = mount(f"over={overlay}", raw_image)
    assert sorted(path.name for path in mounted.point.iterdir()) == [".cowfs", "over", "plain"]
    assert sorted(path.name for path in (mounted.point / ".cowfs").iterdir()) == sorted(
        ["control", "error", "over", "plain", "status.json", "version"]
    )
    assert mounted.flat("over").read_bytes() == overlay.with_name("base.raw").read_bytes()
    assert mounted.flat("plain").read_bytes() == raw_image.read_bytes()


def test_options_of_owner_and_mode(mount: Mounts, raw_image: Path) -> None:
    mounted = mount("-o", "allow_other,mode=640,uid=12,gid=34", raw_image)
    status = mounted.flat("plain").stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 12, 34)
    assert (mounted.point / ".cowfs").stat().st_mode & 0o777 == 0o550
    job = mounted.control("plain", "stream").stat()
    assert (job.st_mode & 0o777, job.st_uid, job.st_gid) == (0o640, 12, 34)
    control = (mounted.point / ".cowfs" / "control").stat()
    assert (control.st_mode & 0o777, control.st_uid) == (0o600, 0), "not for those who may merely use the disks"


def test_the_order_of_mount_helpers(mount: Mounts, raw_image: Path) -> None:
    point = mount.new_point()
    ok(cowfs(raw_image, point, "-o", "rw,noatime"))
    Mounted(point).umount()


# -- using it


def test_direct_io_mmap_and_truncate(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    descriptor = os.open(flat, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, MIB)
    buffer.write(b"d" * MIB)
    assert os.pwrite(descriptor, buffer, 3 * MIB) == MIB
    assert os.preadv(descriptor, [buffer], 3 * MIB) == MIB
    os.close(descriptor)
    with open(flat, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[3 * MIB : 4 * MIB] == b"d" * MIB
        mapped[7 * MIB : 7 * MIB + 4] = b"mmap"
        mapped.flush()
    os.truncate(flat, 65 * MIB)
    assert flat.stat().st_size == 65 * MIB
    with pytest.raises(PermissionError):
        os.truncate(flat, MIB)
    assert "only grow" in mounted.control("overlay", "error").read_text()
    mounted.umount()
    data = content(overlay)
    assert len(data) == 65 * MIB
    assert data[3 * MIB : 4 * MIB] == b"d" * MIB
    assert data[7 * MIB : 7 * MIB + 4] == b"mmap"
    assert not any(data[64 * MIB :])
    assert_sound(overlay)


def test_a_write_beyond_the_end_does_not_change_the_size(mount: Mounts, raw_image: Path) -> None:
    mounted = mount(raw_image)
    flat, size = mounted.flat("plain"), raw_image.stat().st_size
    descriptor = os.open(flat, os.O_RDWR)
    with pytest.raises(OSError, match=r"\[Errno"):
        os.pwrite(descriptor, b"x" * 8192, size - 4096)
        os.fsync(descriptor)
    os.close(descriptor)
    wait_for("the right size", lambda: flat.stat().st_size == size)
    assert raw_image.stat().st_size == size


@pytest.mark.needs("losetup", "loop", "mkfs.ext4")
def test_a_file_system_on_a_loop_device(mount: Mounts, overlay: Path, tmp_path: Path) -> None:
    base = checksum(overlay.with_name("base.raw"))
    data = os.urandom(20 * MIB)
    root = tmp_path / "root"
    root.mkdir()
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    device = ok(cowfs("attach", flat)).strip()
    try:
        assert shell(f"mkfs.ext4 -q {device} && mount {device} {root}").returncode == 0
        (root / "file").write_bytes(data)
        assert "in use" in refusal(cowfs("umount", mounted.point))
        assert "still in use" in refusal(cowfs("detach", flat))
    finally:
        shell(f"umount {root}")
        shell(f"losetup -d {device}")
    wait_for("the loop device to let go", lambda: not shell(f"losetup -j {flat}").stdout)
    assert "no loop device" in refusal(cowfs("detach", flat))
    wait_for("the last close", lambda: not mounted.status()["images"][0]["open-files"])
    mounted.umount()
    assert_sound(overlay)

    mounted = mount(overlay)
    device = ok(cowfs("attach", mounted.flat("overlay"))).strip()
    try:
        assert shell(f"e2fsck -fn {device} && mount -o ro {device} {root}").returncode == 0
        assert (root / "file").read_bytes() == data
        assert shell(f"umount {root}").returncode == 0
    finally:
        ok(cowfs("detach", mounted.flat("overlay")))
    assert checksum(overlay.with_name("base.raw")) == base


# -- jobs under a writer


class Writer:
    """A process that writes random blocks to a flat file, and into a shadow of it the same."""

    CODE = """
import os, random, sys
flat = os.open(sys.argv[1], os.O_RDWR)
shadow = os.open(sys.argv[2], os.O_RDWR)
size = os.fstat(flat).st_size
os.set_blocking(0, False)
rounds = 0
print("started", flush=True)
while True:
    length = random.choice([512, 4096, 65536, 200000])
    offset = random.randrange(0, size - length) // 512 * 512
    data = random.randbytes(length)
    os.pwrite(flat, data, offset)
    os.pwrite(shadow, data, offset)
    check = random.randrange(0, size - 65536)
    assert os.pread(flat, 65536, check) == os.pread(shadow, 65536, check), check
    rounds += 1
    if rounds % 50 == 0:
        os.fsync(flat)
    try:
        if os.read(0, 1) == b"":
            break
    except BlockingIOError:
        pass
print(rounds)
"""

    def __init__(self, flat: Path, shadow: Path) -> None:
        self._process = subprocess.Popen(
            ["python3", "-c", self.CODE, str(flat), str(shadow)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"started\n"

    def stop(self) -> None:
        output, _ = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0
        assert int(output) > 10


def test_stream_under_a_writer(mount: Mounts, overlay: Path) -> None:
    base = overlay.with_name("base.raw")
    shadow = overlay.with_name("shadow")
    shadow.write_bytes(base.read_bytes())
    before = checksum(base)
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    writer = Writer(flat, shadow)
    assert "stream: completed, 100.0 %" in ok(cowfs("stream", "--speed", "100M", flat))
    writer.stop()
    assert len(mounted.control("overlay", "chain").read_text().splitlines()) == 1
    assert flat.read_bytes() == shadow.read_bytes()
    mounted.umount()
    base.rename(base.with_name("gone"))
    assert content(overlay) == shadow.read_bytes()
    assert checksum(base.with_name("gone")) == before
    assert_sound(overlay)


def test_commit_under_a_writer(mount: Mounts, overlay: Path) -> None:
    base = overlay.with_name("base.raw")
    shadow = overlay.with_name("shadow")
    shadow.write_bytes(base.read_bytes())
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    writer = Writer(flat, shadow)
    assert "commit: completed, 100.0 %" in ok(cowfs("commit", flat))
    writer.stop()
    # reading must not fill again what is to be empty in the end
    mounted.control("overlay", "copy-on-read").write_text("off")
    ok(cowfs("commit", "-q", flat))
    assert flat.read_bytes() == shadow.read_bytes()
    mounted.umount()
    assert_sound(overlay)
    assert content(overlay) == base.read_bytes() == shadow.read_bytes()
    depths = {entry["depth"] for entry in json.loads(ok(qemu_img("map", "--output=json", overlay)))}
    assert depths == {1}, "the overlay was to be empty"


def test_a_job_from_the_shell(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    files = mounted.control("overlay", "stream").parent
    assert shell("echo start speed=1M > stream; cat stream", files).stdout.startswith("state: running\noffset: ")
    refused = shell("echo start > commit", files)
    assert "Device or resource busy" in refused.stderr
    assert shell("cat error", files).stdout == "a stream job is running; wait for it, or cancel it\n"
    assert shell("printf pause > stream; cat stream", files).stdout.startswith("state: paused\n")
    assert shell("printf speed=0 > stream; echo resume > stream; cat error", files).stdout == ""
    assert mounted.job_ended("overlay", "stream")["state"] == "completed"
    assert "Invalid argument" in shell("echo begin > stream", files).stderr
    assert "'begin' is no command" in shell("cat error", files).stdout
    assert "Operation not permitted" in shell("echo x > status", files).stderr or os.geteuid() == 0


def test_poll_wakes_waiters(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    path = mounted.control("overlay", "stream")
    with open(path, "rb", buffering=0) as file:
        waiting = select.poll()
        waiting.register(file, select.POLLPRI)
        assert file.read().startswith(b"state: none\n")
        assert waiting.poll(0) == []
        waker = subprocess.Popen(["bash", "-c", f"echo start speed=1k > {path}"])
        assert waiting.poll(1000 * PATIENCE) != []
        assert os.pread(file.fileno(), 4096, 0).startswith(b"state: running\n")
        assert waker.wait() == 0
        waker = subprocess.Popen(["bash", "-c", f"echo cancel > {path}"])
        assert waiting.poll(1000 * PATIENCE) != []
        assert waker.wait() == 0
        assert os.pread(file.fileno(), 4096, 0).startswith(b"state: cancelled\n")


def test_ctrl_c_leaves_the_job_running(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    ok(cowfs("stream", "--no-wait", "--speed", "1k", mounted.flat("overlay")))
    assert mounted.job("overlay", "stream")["state"] == "running"
    refusal(cowfs("stream", mounted.flat("overlay")))
    mounted.control("overlay", "stream").write_text("cancel")
    process = subprocess.Popen(
        [*_PYTHON, "stream", "--speed", "1k", str(mounted.flat("overlay"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for("the job", lambda: mounted.job("overlay", "stream")["state"] == "running")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("stream: running")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, "")
    assert "The stream job goes on" in output
    assert mounted.job("overlay", "stream")["state"] == "running"


def test_offline_jobs(overlay: Path) -> None:
    base = overlay.with_name("base.raw")
    data = base.read_bytes()
    assert ok(cowfs("commit", overlay)).endswith("Image committed.\n")
    assert "stream: completed" in ok(cowfs("stream", overlay))
    base.unlink()
    assert content(overlay) == data
    assert_sound(overlay)
    assert "no backing file" in refusal(cowfs("commit", overlay))
    assert "--no-wait needs a disk of a mount" in refusal(cowfs("stream", "--no-wait", overlay))


# -- images that come and go


def test_images_come_and_go(mount: Mounts, raw_image: Path, overlay: Path) -> None:
    mounted = mount(raw_image)
    control = mounted.point / ".cowfs" / "control"
    assert shell(f"echo add more={overlay} > {control}; cat {control}").stdout == (
        f"plain {raw_image}\nmore {overlay}\n"
    )
    assert mounted.flat("more").read_bytes()[:100] == overlay.with_name("base.raw").read_bytes()[:100]
    assert shell(f"echo remove more > {control}").returncode == 0
    assert not mounted.flat("more").exists()
    assert_sound(overlay)
    inside = shell(f"echo add self={mounted.flat('plain')} > {control}")
    assert "Operation not permitted" in inside.stderr
    assert "lies inside the mount" in (mounted.point / ".cowfs" / "error").read_text()


def test_a_backing_file_in_the_mount_is_refused(mount: Mounts, raw_image: Path, tmp_path: Path) -> None:
    mounted = mount(raw_image)
    trap = tmp_path / "trap.qcow2"
    ok(qemu_img("create", "-u", "-q", "-f", "qcow2", "-b", mounted.flat("plain"), "-F", "raw", trap, "16M"))
    link = tmp_path / "link.raw"
    link.symlink_to(mounted.flat("plain"))
    for path in (trap, link):
        refused = shell(f"echo add x={path} > {mounted.point}/.cowfs/control")
        assert "Operation not permitted" in refused.stderr
        assert "lies inside the mount" in (mounted.point / ".cowfs" / "error").read_text()


# -- how it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_flushes_and_unmounts(mount: Mounts, overlay: Path, number: int) -> None:
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    shell(f"echo start speed=1k > {mounted.control('overlay', 'stream')}")
    descriptor = os.open(flat, os.O_RDWR)
    os.pwrite(descriptor, b"still in the page cache", 9 * MIB)
    os.kill(mounted.pid, number)
    wait_for_end(mounted.process)
    with pytest.raises(OSError, match="not connected"):
        os.close(descriptor)
    assert not list(mounted.point.iterdir())
    assert content(overlay)[9 * MIB :].startswith(b"still in the page cache")
    assert_sound(overlay)


def test_a_dead_mount_is_cleared_by_the_next(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    with open(mounted.flat("overlay"), "r+b") as file:
        file.write(b"acknowledged")
        file.flush()
        os.fsync(file.fileno())
    os.kill(mounted.pid, signal.SIGKILL)
    wait_for_end(mounted.process)
    assert "transport endpoint is not connected" in shell(f"ls {mounted.point}").stderr.lower()
    assert "not connected" in ok(cowfs("status")).lower()
    again = mount(overlay, point=mounted.point)
    assert again.flat("overlay").read_bytes()[:12] == b"acknowledged"
    os.kill(again.pid, signal.SIGKILL)
    wait_for_end(again.process)
    ok(cowfs("umount", mounted.point))
    assert not list(mounted.point.iterdir())
    assert qemu_img("check", overlay).returncode in (0, 3), "leaked clusters are the most that may be wrong"


def test_foreground(mount: Mounts, raw_image: Path) -> None:
    point = mount.new_point()
    server = subprocess.Popen(
        [*_PYTHON, "mount", "-f", str(raw_image), str(point)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    assert server.stderr.readline() == f"cowfs: {point}: serving plain\n"
    assert (point / "plain").exists()
    server.send_signal(signal.SIGINT)
    output, messages = server.communicate(timeout=PATIENCE)
    assert (server.returncode, output, messages) == (0, "", f"cowfs: {point}: ending, after signal 2\n")


def test_a_log_file(mount: Mounts, raw_image: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    mounted = mount("-o", f"log={log}", raw_image)
    shell(f"echo nonsense > {mounted.control('plain', 'stream')}")
    wait_for("the log", lambda: "'nonsense' is no command" in log.read_text())
    assert "Traceback" not in log.read_text()


# -- status


def test_status(mount: Mounts, overlay: Path) -> None:
    mounted = mount(f"vm={overlay}")
    text = ok(cowfs("status", mounted.point))
    assert text.startswith(f"{mounted.point}: server {mounted.pid}, version ")
    layers = f"    1  {overlay.suffix[1:]:<6} {overlay}\n    0  raw    {overlay.with_name('base.raw')}\n"
    assert f"  vm: 64 MiB ({64 * MIB} bytes)\n{layers}" in text
    assert text in ok(cowfs("status"))
    facts = json.loads(ok(cowfs("status", "--json", mounted.point)))
    assert facts == mounted.status()
    assert facts in json.loads(ok(cowfs("status", "--json")))


# -- bad input


def test_bad_input_is_one_line(mount: Mounts, raw_image: Path, tmp_path: Path) -> None:
    point, other = mount.new_point(), tmp_path / "other" / "plain.qcow2"
    other.parent.mkdir()
    ok(qemu_img("create", "-q", "-f", "qcow2", other, "1M"))
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + bytes(100))
    listing = sorted(tmp_path.iterdir())
    cases = {
        (tmp_path / "none.raw", point): "none.raw: cannot open: No such file or directory",
        (raw_image, tmp_path / "none"): "none: the mount point does not exist",
        (raw_image, raw_image): "the mount point is not a directory",
        (raw_image, other, point): "there is a disk 'plain' already",
        (raw_image, f"x={raw_image}", point): "is part of the disk 'plain'",
        (broken, point): "broken.qcow2: ",
        (f".cowfs={raw_image}", point): "cannot be the name of a disk",
        (f"={raw_image}", point): "cannot be the name of a disk",
        (tmp_path, point): "cannot open: Is a directory",
        (raw_image, tmp_path): "where the mount would hide it",
        ("-o", "nonsense", raw_image, point): "unknown mount option 'nonsense'",
        ("-o", "log=/none/log", raw_image, point): "/none/log: cannot open the log",
    }
    for words, sentence in cases.items():
        assert sentence in refusal(cowfs("mount", *words)), words
    assert "missing argument" in refusal(cowfs("mount", point), code=2)
    assert sorted(tmp_path.iterdir()) == listing
    assert not list(point.iterdir())
    mounted = mount(raw_image, point=point)
    assert "cowfs is mounted there already" in refusal(cowfs("mount", other, point))
    assert "there is no such disk" in refusal(cowfs("stream", mounted.flat("none")))
    assert "is no disk of the mount" in refusal(cowfs("stream", mounted.point))
    for option, given in (("--format", ["-f", "raw"]), ("--keep", ["-d"])):
        assert f"{option} is for image files" in refusal(cowfs("commit", *given, mounted.flat("plain")))
    assert "there is no layer 'base' in its chain" in refusal(cowfs("commit", "-b", "base", mounted.flat("plain")))
    assert "does not lie in a cowfs mount" in refusal(cowfs("attach", raw_image))
    assert "no backing file to commit into" in refusal(cowfs("commit", mounted.flat("plain")))
    assert "is not a size" in refusal(cowfs("stream", "--speed", "fast", mounted.flat("plain")))
    for command in ("umount", "status"):
        assert "is not the mount point of a cowfs mount" in refusal(cowfs(command, tmp_path))

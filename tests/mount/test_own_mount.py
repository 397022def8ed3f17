"""What a server looks at may be its own mount, or one that does not answer: every other file goes on being served."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest
from commandline import cowfs, ok, qemu_img, refusal
from filesystems import file_system, loop_on
from mounting import Mounted, Mounts, shell, wait_for

pytestmark = pytest.mark.needs("root", "fuse", "qemu-img")

MIB = 1 << 20
#: seconds; what is answered at once takes less, also on a busy machine, and `cowfs.fuse.server.PATIENCE` is more
AT_ONCE = 10.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "64M"))
    return path


def refused(mounted: Mounted, text: str, control: str = "control") -> str:
    """Write a command that must be refused at once; why."""
    start = monotonic()
    result = subprocess.run(
        ["timeout", "-k", "1", "60", "sh", "-c", f'printf %s "$1" > {mounted.point}/.cowfs/{control}', "sh", text],
        capture_output=True,
        check=False,
    )
    assert monotonic() - start < AT_ONCE
    assert result.returncode not in (0, 124, 137), text
    return (mounted.point / ".cowfs" / control).with_name("error").read_text()


@contextmanager
def held_open(path: Path) -> Iterator[None]:
    """A process that has a file open; ours would hang with each that it starts, which closes what it inherits."""
    with subprocess.Popen(
        ["sh", "-c", 'exec 9<"$1"; echo ready; read -r end', "sh", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            holder.communicate(b"end\n")


@contextmanager
def stopped(mounted: Mounted) -> Iterator[None]:
    """A mount whose server does not answer."""
    os.kill(mounted.pid, signal.SIGSTOP)
    wait_for("the stop", lambda: "T" in Path(f"/proc/{mounted.pid}/stat").read_text().rsplit(")", 1)[1].split()[0])
    try:
        yield
    finally:
        os.kill(mounted.pid, signal.SIGCONT)


def test_a_lock_that_is_refused_is_refused_at_once(mount: Mounts, image: Path, raw_image: Path, tmp_path: Path) -> None:
    """Whoever holds it has descriptors open in this mount, and another process in one that does not answer."""
    (tmp_path / "link.qcow2").symlink_to(image)
    (tmp_path / "hard.qcow2").hardlink_to(image)
    other = mount(f"o={raw_image}")
    mounted = mount(f"a={image}")
    with held_open(mounted.flat("a")), held_open(other.flat("o")), stopped(other):
        for name in ("link", "hard", "image"):
            assert "is part of the disk 'a'" in refused(mounted, f"add y={tmp_path}/{name}.qcow2")
        held = tmp_path / "held.qcow2"
        ok(qemu_img("create", "-q", "-f", "qcow2", held, "1M"))
        with subprocess.Popen(
            ["qemu-io", "-f", "qcow2", str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.write("length\n")
            holder.stdin.flush()
            while "MiB" not in holder.stdout.readline():
                assert holder.poll() is None
            assert f"process {holder.pid} (qemu-io)" in refused(mounted, f"add y={held}")
            holder.communicate("quit\n")
        assert mounted.flat("a").stat().st_size == 64 * MIB
    mounted.umount()
    other.umount()


@pytest.mark.parametrize("way", ["plain", "link", "folder", "bind", "descriptor", "backing", "data", "socket"])
def test_nothing_leads_into_the_own_mount(
    mount: Mounts, image: Path, raw_image: Path, tmp_path: Path, way: str
) -> None:
    mounted = mount(f"a={image}", f"b={raw_image}")
    flat = mounted.flat("b")
    bound = tmp_path / "bound"
    path: Path | str = flat
    with flat.open("rb") as file:
        if way == "link":
            path = tmp_path / "link"
            path.symlink_to(flat)
        elif way == "folder":
            (tmp_path / "folder").symlink_to(mounted.point)
            path = tmp_path / "folder" / "b"
        elif way == "bind":
            bound.touch()
            ok(shell(f"mount --bind {flat} {bound}"))
            path = bound
        elif way == "descriptor":
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        elif way == "backing":
            path = tmp_path / "top.qcow2"
            ok(qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", flat, "-F", "raw", path, "16M"))
        elif way == "data":
            path = tmp_path / "top.qcow2"
            ok(qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, "1M"))
            (tmp_path / "data").unlink()
            (tmp_path / "data").symlink_to(flat)
        elif way == "socket":
            path = f"nbd+unix:///?socket={mounted.point}/b"
        try:
            sentence = refused(mounted, f"add y={path} format={'qcow2' if 'top' in str(path) else 'raw'}")
            assert f"lies inside the mount {mounted.point}, which cannot serve it to itself" in sentence
        finally:
            shell(f"umount {bound}")
    for text, control in (
        (f"create {mounted.point}/new.qcow2", "a/snapshot"),
        (f"record {mounted.point}/trace", "a/trace"),
        (f"start trace={flat}", "a/stream"),
    ):
        assert "lies inside the mount" in refused(mounted, text, control)
    mounted.umount()


@pytest.mark.needs("loop", "mkfs.ext4")
def test_nothing_stands_on_the_own_mount(mount: Mounts, image: Path, raw_image: Path, tmp_path: Path) -> None:
    mounted = mount(f"a={image}", f"b={raw_image}")
    with loop_on(mounted.flat("b")) as device:
        assert f"stands on the mount {mounted.point}" in refused(mounted, f"add y={device} format=raw")
    with file_system(mounted, "a", tmp_path) as inner:
        (inner.root / "image").write_bytes(bytes(MIB))
        assert f"stands on the mount {mounted.point}" in refused(mounted, f"add y={inner.root}/image format=raw")
        assert "stands on the mount" in refused(mounted, f"create {inner.root}/new.qcow2", "b/snapshot")
        assert {path.name for path in inner.root.iterdir()} == {"lost+found", "image"}
    mounted.umount()


def test_a_mount_that_does_not_answer_holds_nothing_up(mount: Mounts, image: Path, raw_image: Path) -> None:
    """But for the one command that names it, which is told."""
    other = mount(f"o={raw_image}")
    mounted = mount(f"a={image}")
    outcome: list[str] = []

    def add() -> None:
        outcome.append(cowfs("add", mounted.point, f"y={other.point}/o").stderr)

    with stopped(other):
        adding = threading.Thread(target=add)
        adding.start()
        start = monotonic()
        with mounted.flat("a").open("r+b") as file:
            for number in range(50):
                os.pwrite(file.fileno(), b"x" * 4096, number * MIB)
                os.fsync(file.fileno())
        assert [path.name for path in mounted.point.iterdir()] == [".cowfs", "a"]
        mounted.status()
        os.statvfs(mounted.point)
        assert adding.is_alive() and monotonic() - start < AT_ONCE, "none of this waited for it"
        adding.join(60)
        assert outcome == [f"cowfs: {other.point}/o: the file system that it lies in has not answered for 15 seconds\n"]
    assert "is no disk" not in refused(mounted, f"add {image}.missing")
    ok(cowfs("add", "-r", mounted.point, f"y={other.point}/o"))
    assert mounted.flat("y").read_bytes() == raw_image.read_bytes()
    mounted.umount()
    other.umount()
    ok(qemu_img("check", "-q", image))


def test_an_image_in_a_mount_that_stops_answering_holds_up_itself_alone(
    mount: Mounts, image: Path, raw_image: Path
) -> None:
    before = raw_image.read_bytes()
    other = mount(f"o={raw_image}")
    mounted = mount(f"a={image}", f"y={other.point}/o")
    with mounted.flat("y").open("r+b") as file:
        os.pwrite(file.fileno(), b"first", 0)
        os.fsync(file.fileno())
    with stopped(other):
        writing = subprocess.Popen(
            ["dd", "if=/dev/urandom", f"of={mounted.flat('y')}", "bs=4k", "count=1", "seek=1", "conv=notrunc,fsync"],
            stderr=subprocess.DEVNULL,
        )
        reading = subprocess.Popen(["cmp", mounted.flat("y"), raw_image], stdout=subprocess.DEVNULL)
        start = monotonic()
        with mounted.flat("a").open("r+b") as file:
            for number in range(50):
                os.pwrite(file.fileno(), b"x" * 4096, number * MIB)
                os.fsync(file.fileno())
        assert monotonic() - start < AT_ONCE
        assert writing.poll() is None
    assert writing.wait(60) == 0
    reading.wait(60)
    mounted.umount()
    other.umount()
    after = raw_image.read_bytes()
    assert (after[:5], after[5:4096], after[8192:]) == (b"first", before[5:4096], before[8192:])


# -- sentences


def test_a_chain_that_comes_back_to_itself_is_called_that(tmp_path: Path, mount: Mounts, image: Path) -> None:
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", first, "1M"))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", first, "-F", "qcow2", second))
    ok(qemu_img("rebase", "-u", "-b", second, "-F", "qcow2", first))
    point = mount.new_point()
    for words in (("mount", first, point), ("mount", "-o", "nolock", first, point), ("stream", first), ("map", first)):
        assert refusal(cowfs(*words)) == f"{first}: the chain of backing files comes back to this file"
    mounted = mount(image)
    assert "comes back to this file" in refused(mounted, f"add y={first}")
    mounted.umount()


@pytest.mark.parametrize("words", [("create", "-f", "raw", "{}", "64M"), ("convert", "-O", "raw", "{raw}", "{}")])
def test_a_disk_of_a_mount_is_not_made_anew(
    mount: Mounts, image: Path, raw_image: Path, words: tuple[str, ...]
) -> None:
    mounted = mount(f"a={image}")
    flat = mounted.flat("a")
    sentence = refusal(cowfs(*(word.format(flat, raw=raw_image) for word in words)))
    way = f"is a disk of the mount {mounted.point}, and cannot be made anew; 'cowfs convert -n' writes into it"
    assert sentence == f"{flat}: {way}"
    absent = mounted.point / "new"
    sentence = refusal(cowfs(*(word.format(absent, raw=raw_image) for word in words)))
    assert sentence == f"{absent}: there is no such disk in the mount {mounted.point}"
    ok(cowfs("convert", "-n", "-O", "raw", raw_image, flat))
    assert flat.read_bytes()[: 16 * MIB] == raw_image.read_bytes()
    mounted.umount()


@pytest.mark.needs("loop")
def test_what_a_loop_device_does_not_show_is_said(mount: Mounts, tmp_path: Path) -> None:
    odd, even = tmp_path / "odd", tmp_path / "even"
    odd.write_bytes(bytes(MIB + 100))
    even.write_bytes(bytes(MIB))
    mounted = mount(odd, even)
    result = cowfs("attach", mounted.flat("odd"))
    device = result.stdout.strip()
    try:
        lack = "has whole sectors, and does not show the last 100 bytes of the disk"
        assert result.stderr == f"cowfs: {mounted.flat('odd')}: warning: {device} {lack}\n"
        with loop_on(mounted.flat("even")):
            pass
        # nobody would know what to detach
        full = shell(f"{sys.executable} -m cowfs attach {mounted.flat('even')} >/dev/full")
        assert (full.returncode, full.stderr) == (1, "cowfs: standard output: No space left on device\n")
        assert ok(shell(f"losetup --associated {mounted.flat('even')}")) == ""
    finally:
        wait_for("the loop device to let go", lambda: cowfs("detach", mounted.flat("odd")).returncode == 0)
    mounted.umount()

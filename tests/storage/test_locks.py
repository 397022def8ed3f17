"""Locks on images: QEMU and cowfs, and cowfs and cowfs, keep out of each other's way."""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounts, wait_for

from cowfs.errors import Busy, StorageError
from cowfs.storage.file import FileStorage

MIB = 1 << 20


@contextmanager
def qemu_has_open(image: Path, format: str, *, read_only: bool = False) -> Iterator[int]:
    """A QEMU process that has an image open; its number."""
    words = ["qemu-io", *(["-r"] if read_only else []), "-f", format, str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "MiB" not in process.stdout.readline():
            assert process.poll() is None
        try:
            yield process.pid
        finally:
            process.stdin.write("quit\n")
            process.stdin.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "8M"))
    return path


@pytest.fixture
def overlays(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A raw base, and two overlays on it."""
    base, first, second = (tmp_path / name for name in ("base.raw", "first.qcow2", "second.qcow2"))
    base.write_bytes(os.urandom(4 * MIB))
    for overlay in (first, second):
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay))
    return base, first, second


CHANGES = [
    ("resize", "{}", "+1M"),
    ("check", "-r", "all", "{}"),
    ("snapshot", "-c", "new", "{}"),
    ("create", "-f", "qcow2", "{}", "1M"),
    ("rebase", "-u", "-b", "", "{}"),
]
LOOKS = [("info", "{}"), ("map", "{}"), ("check", "{}"), ("compare", "{}", "{}"), ("measure", "{}"), ("snapshot", "{}")]
USAGE = {"check": 1, "compare": 2}


@pytest.mark.parametrize("words", [*CHANGES, *LOOKS], ids=" ".join)
def test_what_qemu_writes_to_is_left_alone(image: Path, words: tuple[str, ...]) -> None:
    before = image.read_bytes()
    with qemu_has_open(image, "qcow2") as process:
        sentence = refusal(cowfs(*(word.format(image) for word in words)), USAGE.get(words[0], 1))
        assert sentence == f"{image}: is being written to by process {process} (qemu-io)" or (
            sentence == f"{image}: is in use by process {process} (qemu-io), and cannot be written to meanwhile"
        )
        assert image.read_bytes() == before
        if words in LOOKS:
            ok(cowfs(words[0], "-U", *(word.format(image) for word in words[1:])))
    result = cowfs(*(word.format(image) for word in words))
    assert (result.returncode, result.stderr) == (0, "")


def test_what_qemu_only_reads_can_be_read_and_not_written(image: Path) -> None:
    with qemu_has_open(image, "qcow2", read_only=True) as process:
        ok(cowfs("info", image))
        assert f"is in use by process {process} (qemu-io)" in refusal(cowfs("resize", image, "+1M"))
    ok(cowfs("resize", image, "+1M"))


def test_what_a_mount_writes_to_is_refused_by_qemu_and_by_cowfs(mount: Mounts, image: Path) -> None:
    mounted = mount(image)
    for words in (["info"], ["check"], ["resize", "--shrink"]):
        result = qemu_img(*words, image, *(["4M"] if "resize" in words else []))
        assert result.returncode and "lock" in result.stderr
    assert f"is being written to by process {mounted.pid} (cowfs" in refusal(cowfs("info", image))
    assert f"by process {mounted.pid} (cowfs" in refusal(cowfs("mount", image, mount.new_point()))
    ok(qemu_img("info", "-U", image))
    ok(cowfs("info", "-U", image))
    mounted.umount()
    ok(qemu_img("check", "-q", image))
    ok(cowfs("info", image))


def test_backing_files_are_shared_for_reading(mount: Mounts, overlays: tuple[Path, Path, Path]) -> None:
    base, first, second = overlays
    mounted = mount(first)
    mount(second)
    ok(qemu_img("convert", "-O", "qcow2", base, base.with_name("copy")))
    assert "lock" in qemu_img("resize", "-f", "raw", base, "+1M").stderr
    # neither may commit into what the other reads
    assert "is in use by process" in cowfs("commit", mounted.flat("first")).stderr
    assert (mounted.flat("first")).read_bytes() == base.read_bytes()


def test_a_read_only_mount_keeps_writers_out(mount: Mounts, image: Path) -> None:
    mount("-o", "ro", image)
    mount("-o", "ro", image)
    ok(qemu_img("info", image))
    assert "lock" in qemu_img("resize", image, "+1M").stderr


def test_nolock_neither_asks_nor_tells(mount: Mounts, image: Path) -> None:
    with qemu_has_open(image, "qcow2"):
        mounted = mount("-o", "nolock,ro", image)
        assert mounted.flat("image").stat().st_size == 8 * MIB
        mounted.umount()
    mount("-o", "nolock", image)
    qemu_io(image, "qcow2", "read 0 512")


def test_a_commit_writes_to_the_base_and_lets_go_of_it(mount: Mounts, overlays: tuple[Path, Path, Path]) -> None:
    base, first, _ = overlays
    mounted = mount(first)
    with mounted.flat("first").open("r+b") as file:
        file.write(b"x" * 65536)
    ok(cowfs("commit", mounted.flat("first")))
    # as before: open for reading
    ok(qemu_img("info", base))
    assert "lock" in qemu_img("resize", "-f", "raw", base, "+1M").stderr
    mounted.umount()
    assert base.read_bytes()[:65536] == b"x" * 65536


def test_locks_end_with_a_process_that_is_killed(mount: Mounts, image: Path) -> None:
    mounted = mount(image)
    os.kill(mounted.pid, 9)
    wait_for("the locks to end", lambda: qemu_img("info", image).returncode == 0)


def test_two_disks_of_one_process(image: Path) -> None:
    first = FileStorage.open(str(image), writable=True)
    with pytest.raises(Busy, match="is being written to by another disk of this process"):
        FileStorage.open(str(image), writable=False)
    os.close(first.fileno())
    FileStorage.open(str(image), writable=False)


async def test_a_reopening_that_fails_keeps_the_lock_that_there_was(image: Path) -> None:
    first = FileStorage.open(str(image), writable=False)
    second = FileStorage.open(str(image), writable=False)
    with pytest.raises(Busy, match="is in use by another disk"):
        await first.reopen(writable=True)
    assert first.read_only
    await second.close()
    with pytest.raises(Busy):
        FileStorage.open(str(image), writable=True)
    await first.reopen(writable=True)
    with pytest.raises(Busy):
        FileStorage.open(str(image), writable=False)
    await first.reopen(writable=False)
    await FileStorage.open(str(image), writable=False).close()
    await first.close()


def test_locks_that_are_not_shared_are_somebody_elses(image: Path) -> None:
    with image.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        assert refusal(cowfs("info", image)).endswith("is locked by another process")


def test_a_file_system_without_locks_says_so(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> bytes:
        raise OSError(37, "no locks")

    monkeypatch.setattr("cowfs.storage.locks.fcntl.fcntl", no_locks)
    with pytest.raises(StorageError, match="cannot be locked: No locks available"):
        FileStorage.open(str(image), writable=True)
    FileStorage.open(str(image), writable=True, locking=False)

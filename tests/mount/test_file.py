"""A flat file behaves as a file does that is a disk: sizes, times, space, and what cannot be done to it."""

import errno
import mmap
import os
import random
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from fallocating import PUNCH_HOLE, allocated, fallocate
from mounting import Mounts, wait_for

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img")]

KIB, MIB = 1 << 10, 1 << 20


def test_sizes_change_down_only_where_that_is_allowed(mount: Mounts, raw_image: Path, overlay: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount("-o", "allow-shrink", raw_image)
    flat = mounted.flat("plain")
    os.truncate(flat, 15 * MIB + 512)
    assert flat.read_bytes() == data[: 15 * MIB + 512]
    os.truncate(flat, 16 * MIB)
    assert flat.read_bytes() == data[: 15 * MIB + 512] + bytes(MIB - 512)
    with pytest.raises(PermissionError):
        os.truncate(flat, 0)
    with pytest.raises(PermissionError):
        os.open(flat, os.O_RDWR | os.O_TRUNC)
    assert flat.stat().st_size == raw_image.stat().st_size == 16 * MIB
    other = mount(overlay)
    with pytest.raises(PermissionError):
        os.truncate(other.flat("overlay"), 63 * MIB)
    assert "allow-shrink" in other.control("overlay", "error").read_text()


def test_a_job_keeps_the_size(mount: Mounts, overlay: Path) -> None:
    mounted = mount("-o", "allow-shrink", overlay)
    mounted.control("overlay", "stream").write_text("start speed=1")
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        os.truncate(mounted.flat("overlay"), 60 * MIB)


def test_correcting_the_kernel_never_makes_a_disk_smaller(mount: Mounts, raw_image: Path) -> None:
    """A write beyond the end has the kernel told the size; meanwhile the disk may have grown."""
    mounted = mount("-o", "allow-shrink", raw_image)
    flat = mounted.flat("plain")
    size = flat.stat().st_size
    for _ in range(300):
        with open(flat, "r+b", buffering=0) as file:
            page = mmap.mmap(-1, 4096)
            descriptor = os.open(flat, os.O_RDWR | os.O_DIRECT)
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                os.pwrite(descriptor, page, size)
            os.close(descriptor)
            size += 4096
            file.truncate(size)
            assert os.fstat(file.fileno()).st_size == size
    wait_for("the last correction", lambda: not mounted.status()["images"][0]["open-files"])
    assert flat.stat().st_size == raw_image.stat().st_size == size


@pytest.mark.parametrize("options", ["writeback-cache", "no-writeback-cache"])
def test_appending_has_no_room(mount: Mounts, raw_image: Path, options: str) -> None:
    flat = mount("-o", options, raw_image).flat("plain")
    descriptor = os.open(flat, os.O_WRONLY | os.O_APPEND)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        os.write(descriptor, b"more")
    os.close(descriptor)
    assert flat.stat().st_size == 16 * MIB
    assert raw_image.stat().st_size == 16 * MIB


def test_names_are_the_images(mount: Mounts, raw_image: Path) -> None:
    mounted = mount(raw_image)
    flat = mounted.flat("plain")
    for change in (
        flat.unlink,
        lambda: flat.rename(flat.with_name("other")),
        lambda: flat.with_name("link").hardlink_to(flat),
        lambda: flat.with_name("new").write_text("x"),
        lambda: flat.with_name("dir").mkdir(),
    ):
        with pytest.raises(PermissionError):
            change()
    assert [path.name for path in mounted.point.iterdir() if path.name != ".cowfs"] == ["plain"]


@pytest.mark.parametrize("options", ["writeback-cache", "no-writeback-cache"])
def test_times_move_when_guests_write(mount: Mounts, raw_image: Path, options: str) -> None:
    overlay = raw_image.with_name("overlay.qcow2")
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", raw_image, "-F", "raw", overlay))
    mounted = mount("-o", options, overlay)
    flat = mounted.flat("overlay")
    before = flat.stat().st_mtime
    # copy-on-read and a stream write to the overlay, not to the disk
    flat.read_bytes()
    mounted.control("overlay", "stream").write_text("start")
    assert mounted.job_ended("overlay", "stream")["state"] == "completed"
    wait_for("the kernel to ask again", lambda: allocated(flat) > MIB)
    assert flat.stat().st_mtime == before
    past = 1_600_000_000
    descriptor = os.open(flat, os.O_RDWR)
    direct = os.open(flat, os.O_RDWR | os.O_DIRECT)

    def mapped() -> None:
        with mmap.mmap(descriptor, MIB) as memory:
            memory[:4] = os.urandom(4)
            memory.flush()

    for change in (
        lambda: os.pwrite(descriptor, os.urandom(4096), 0),
        lambda: os.pwrite(direct, mmap.mmap(-1, 4096), 8192),
        mapped,
        lambda: fallocate(descriptor, PUNCH_HOLE, 0, 2 * MIB),
        lambda: mounted.control("overlay", "discard").write_text("2M 1M"),
        lambda: os.truncate(flat, flat.stat().st_size + MIB),
    ):
        os.utime(flat, (past, past))
        wait_for("the time to be set", lambda: flat.stat().st_mtime == past)
        change()
        wait_for("the time to move", lambda: flat.stat().st_mtime > past)
    os.close(descriptor)
    os.close(direct)


def test_blocks_are_those_of_the_chain(mount: Mounts, overlay: Path) -> None:
    mounted = mount("-o", "no-copy-on-read", overlay)
    flat = mounted.flat("overlay")
    base = allocated(overlay.with_name("base.raw"))
    with open(flat, "r+b") as file:
        file.write(os.urandom(8 * MIB))
        os.fsync(file.fileno())
        wait_for("what was written to be counted", lambda: allocated(flat) >= base + 8 * MIB)
        assert allocated(flat) == base + allocated(overlay)
        fallocate(file.fileno(), PUNCH_HOLE, 0, 8 * MIB)
        os.fsync(file.fileno())
        os.fsync(file.fileno())
        wait_for("what was discarded to be counted", lambda: allocated(flat) < base + MIB)


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_zeros_that_are_written(mount: Mounts, overlay: Path, mode: str) -> None:
    mounted = mount("-o", f"no-copy-on-read,detect-zeroes={mode}", overlay)
    flat = mounted.flat("overlay")
    model = bytearray(flat.read_bytes())
    with open(flat, "r+b", buffering=0) as file:
        file.write(data := os.urandom(4 * MIB))
        model[: 4 * MIB] = data
        os.fsync(file.fileno())
        full = allocated(overlay)
        file.seek(8 * MIB)
        file.write(bytes(16 * MIB))
        model[8 * MIB : 24 * MIB] = bytes(16 * MIB)
        file.seek(0)
        file.write(bytes(2 * MIB))
        model[: 2 * MIB] = bytes(2 * MIB)
        os.fsync(file.fileno())
        os.fsync(file.fileno())
    now = allocated(overlay)
    if mode == "off":
        assert now > full + 15 * MIB
    elif mode == "on":
        assert full <= now < full + MIB
    else:
        assert now < full - MIB
    assert flat.read_bytes() == model
    mounted.umount()
    out = overlay.with_name("flat")
    out.write_bytes(model)
    assert qemu_img("check", overlay).returncode == 0
    assert qemu_img("compare", out, overlay).returncode == 0


def test_detecting_zeros_changes_nothing_that_is_read(mount: Mounts, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "8M"))
    mounted = mount("-o", "detect-zeroes=unmap,no-writeback-cache", path)
    rnd = random.Random(2)
    model = bytearray(8 * MIB)
    with open(mounted.flat("disk"), "r+b", buffering=0) as file:
        for _ in range(300):
            length = rnd.choice([1, 511, 512, 4096, 70_000])
            offset = rnd.randrange(8 * MIB - length)
            data = bytes(length) if rnd.random() < 0.5 else rnd.randbytes(length)
            assert os.pwrite(file.fileno(), data, offset) == length
            model[offset : offset + length] = data
    assert mounted.flat("disk").read_bytes() == model

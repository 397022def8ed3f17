"""A host file system without space left: errors go to those who need space, and nothing is lost."""

import errno
import json
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from fallocating import PUNCH_HOLE, fallocate
from mounting import Mounted, Mounts, shell, wait_for

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    assert shell(f"mount -t tmpfs -o size=6m tmpfs {folder}").returncode == 0
    yield folder
    shell(f"umount -l {folder}")


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_a_full_host_fails_what_needs_space_and_loses_nothing(
    small: Path, mount: Mounts, tmp_path: Path, format: str
) -> None:
    chooser = random.Random(1)
    base, overlay = tmp_path / "base.raw", small / "overlay"
    model = bytearray(chooser.randbytes(16 * MIB))
    base.write_bytes(model)
    ok(qemu_img("create", "-q", "-f", format, "-b", base, "-F", "raw", overlay))
    mounted = mount("-o", "no-copy-on-read,no-writeback-cache", overlay)
    flat = mounted.flat("overlay")
    assert "No space left" in cowfs("stream", flat).stderr
    refused = 0
    with flat.open("r+b", buffering=0) as file:
        for _ in range(300):
            offset = chooser.randrange(16 * MIB // 4096) * 4096
            data = chooser.randbytes(4096)
            try:
                os.pwrite(file.fileno(), data, offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                refused += 1
            else:
                model[offset : offset + 4096] = data
        assert refused
        assert flat.read_bytes() == model
        os.fsync(file.fileno())
        assert flat.read_bytes() == model
        assert shell(f"mount -o remount,size=64m {small}").returncode == 0
        os.fsync(file.fileno())
        os.pwrite(file.fileno(), b"x" * 4096, 0)
        model[:4096] = b"x" * 4096
    ok(cowfs("stream", flat))
    mounted.umount()
    ok(qemu_img("check", "-q", "-f", format, overlay))
    ok(qemu_img("convert", "-f", format, "-O", "raw", overlay, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == model


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_tables_have_their_space_before_anything_is_entered_in_them(
    small: Path, mount: Mounts, tmp_path: Path, format: str
) -> None:
    overlay = small / "overlay"
    ok(qemu_img("create", "-q", "-f", format, overlay, "64G"))
    mounted = mount("-o", "no-writeback-cache", overlay)
    done = {}
    with mounted.flat("overlay").open("r+b", buffering=0) as file:
        # each write needs a table of its own
        for number in range(100):
            data = bytes([number + 1]) * 65536
            try:
                os.pwrite(file.fileno(), data, number << 29)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
            done[number << 29] = data
        assert 5 < len(done) < 100
        os.fsync(file.fileno())
    mounted.umount()
    ok(qemu_img("check", "-q", "-f", format, overlay))
    mounted = mount("-o", "ro", overlay)
    with mounted.flat("overlay").open("rb", buffering=0) as file:
        for offset, data in done.items():
            assert os.pread(file.fileno(), 65536, offset) == data


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_no_write_is_accepted_whose_cluster_has_no_room(
    small: Path, mount: Mounts, tmp_path: Path, format: str
) -> None:
    base, overlay = tmp_path / "base.raw", small / "overlay"
    model = bytearray(random.Random(1).randbytes(16 * MIB))
    base.write_bytes(model)
    ok(qemu_img("create", "-q", "-f", format, "-b", base, "-F", "raw", overlay))
    mounted = mount("-o", "no-copy-on-read,no-writeback-cache,flush-interval=1000", overlay)
    accepted = 0
    with mounted.flat("overlay").open("r+b", buffering=0) as file:
        for offset in range(0, 16 * MIB, 65536):
            try:
                os.pwrite(file.fileno(), b"x" * 4096, offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                model[offset : offset + 4096] = b"x" * 4096
                accepted += 1
        # the clusters that fit into the file system, and not all those that are begun
        assert 40 < accepted < 6 * MIB // 65536
        os.fsync(file.fileno())
    mounted.umount()
    ok(qemu_img("check", "-q", "-f", format, overlay))
    ok(qemu_img("convert", "-f", format, "-O", "raw", overlay, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == model


@contextmanager
def opened(flat: Path) -> Iterator[int]:
    """A descriptor whose close, which flushes, may fail as an fsync does."""
    descriptor = os.open(flat, os.O_RDWR)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


@pytest.fixture
def filled(small: Path, mount: Mounts) -> Mounted:
    """A mounted disk of 16 MiB in those 6, through the kernel's cache, which has taken 12 MiB more than fit."""
    overlay = small / "overlay"
    ok(qemu_img("create", "-q", "-f", "qcow2", overlay, "16M"))
    mounted = mount(overlay)
    with opened(mounted.flat("overlay")) as file:
        os.pwrite(file, b"A" * 16 * MIB, 0)
        with pytest.raises(OSError, match="No space left"):
            os.fsync(file)
    return mounted


@pytest.mark.needs("root", "fuse")
def test_after_an_fsync_that_failed_none_succeeds_before_all_is_written_again(filled: Mounted, small: Path) -> None:
    flat = filled.flat("overlay")
    for _ in range(3):
        with opened(flat) as file, pytest.raises(OSError, match="No space left"):
            os.fsync(file)
    assert (
        "that were written before are lost, until they are written again"
        in filled.control("overlay", "error").read_text()
    )
    assert shell(f"mount -o remount,size=64m {small}").returncode == 0
    with opened(flat) as file:
        with pytest.raises(OSError, match="No space left"):
            # there is room now, but what was lost is lost
            os.fsync(file)
        os.pwrite(file, b"B" * 8 * MIB, 0)
        with pytest.raises(OSError, match="No space left"):
            os.fsync(file)
        fallocate(file, PUNCH_HOLE, 8 * MIB, 8 * MIB)
        os.fsync(file)
    filled.umount()
    ok(qemu_img("convert", "-O", "raw", small / "overlay", small / "flat"))
    assert (small / "flat").read_bytes() == b"B" * 8 * MIB + bytes(8 * MIB)


@pytest.mark.needs("root", "fuse")
def test_a_write_that_was_refused_to_its_face_is_no_loss(small: Path, mount: Mounts) -> None:
    overlay = small / "overlay"
    ok(qemu_img("create", "-q", "-f", "qcow2", overlay, "16M"))
    mounted = mount(overlay)
    descriptor = os.open(mounted.flat("overlay"), os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, MIB)
    with pytest.raises(OSError, match="No space left"):
        for start in range(0, 16 * MIB, MIB):
            os.pwritev(descriptor, [buffer], start)
    os.fsync(descriptor)
    os.close(descriptor)
    mounted.umount()
    ok(qemu_img("check", "-q", overlay))


@pytest.mark.needs("root", "fuse")
def test_a_mount_that_cannot_be_flushed_stays_unless_that_is_forced(filled: Mounted, small: Path) -> None:
    refused = cowfs("umount", filled.point)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"cowfs: {filled.flat('overlay')}: cannot flush, so it stays mounted: No space left on device;"
        " make room, or what else it takes, and try again, or give it up with --force\n"
    )
    assert os.path.ismount(filled.point)


@pytest.mark.needs("root", "fuse")
def test_forced_it_ends_and_says_that_something_is_lost(small: Path, mount: Mounts) -> None:
    overlay = small / "overlay"
    ok(qemu_img("create", "-q", "-f", "qcow2", overlay, "16M"))
    mounted = mount(overlay)
    with opened(mounted.flat("overlay")) as file:
        os.pwrite(file, b"A" * 16 * MIB, 0)
    forced = cowfs("umount", "--force", mounted.point)
    assert forced.returncode == 1
    assert forced.stderr == (
        f"cowfs: {mounted.flat('overlay')}: was unmounted, and not all that was written is stored:"
        " No space left on device\n"
    )
    assert not os.path.ismount(mounted.point)
    ok(qemu_img("check", "-q", overlay))


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    device = shell(f"losetup -f --show {file}").stdout.strip()
    try:
        yield Path(device)
    finally:
        shell(f"losetup -d {device}")
        wait_for("the loop device to let go", lambda: not shell(f"losetup -j {file}").stdout)


@pytest.mark.needs("root", "fuse", "loop", "losetup", "blkdiscard")
@pytest.mark.parametrize("options", [[], ["-o", "cluster_size=4k,refcount_bits=64"], ["-o", "extended_l2=on"]])
def test_a_device_of_the_size_that_measure_says_is_enough_for_ever(
    tmp_path: Path, mount: Mounts, options: list[str]
) -> None:
    """Through a loop device, as a file system on the disk would: filled and discarded, again and again."""
    size = 32 * MIB
    measured = json.loads(ok(cowfs("measure", "--json", "--size", str(size), "-O", "qcow2", *options)))
    (tmp_path / "device").write_bytes(b"")
    os.truncate(tmp_path / "device", measured["fully-allocated"])
    with loop_device(tmp_path / "device") as device:
        ok(cowfs("create", "-q", "-f", "qcow2", *options, device, str(size)))
        mounted = mount(f"v={device}")
        flat = mounted.flat("v")
        with loop_device(flat) as disk:
            for turn in range(4):
                data = random.Random(turn).randbytes(30 * MIB)
                with disk.open("r+b", buffering=0) as file:
                    file.write(data)
                    os.fsync(file.fileno())
                    file.seek(0)
                    assert file.read(len(data)) == data
                assert shell(f"blkdiscard -l {30 * MIB} {disk}").returncode == 0
        with flat.open("r+b", buffering=0) as file:
            file.write(b"Z" * size)
            os.fsync(file.fileno())
        mounted.umount()
        ok(qemu_img("check", "-q", "-f", "qcow2", device))
        ok(qemu_img("convert", "-f", "qcow2", "-O", "raw", device, tmp_path / "flat"))
        assert (tmp_path / "flat").read_bytes() == b"Z" * size

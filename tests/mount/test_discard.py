"""Discards, zeros and holes through a mount, with the tools that people use."""

import errno
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from fallocating import COLLAPSE_RANGE, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, allocated, data_ranges, fallocate
from filesystems import file_system, loop_on
from mounting import Mounts, shell, wait_for

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img")]

KIB, MIB = 1 << 10, 1 << 20

#: name: format, options of creation, whether there is a backing file
IMAGES = {
    "raw": ("raw", "", False),
    "qcow2": ("qcow2", "", False),
    "qcow2 over": ("qcow2", "", True),
    "qcow2-v2 over": ("qcow2", "compat=0.10", True),
    "qcow2-extended over": ("qcow2", "extended_l2=on", True),
    "qcow2-data": ("qcow2", "data_file=data", False),
    "qcow2-data over": ("qcow2", "data_file=data", True),
    "qcow2-data-raw": ("qcow2", "data_file=data,data_file_raw=on", False),
    "qed": ("qed", "", False),
    "qed over": ("qed", "", True),
}
SIZE = 16 * MIB


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image of 16 MiB, named after its kind; what is below it, and a third of itself, is random bytes."""
    format, options, over = IMAGES[request.param]
    path = tmp_path / f"disk.{format}"
    words = ["-o", options] if options else []
    if over:
        (tmp_path / "base").write_bytes(os.urandom(SIZE))
        words += ["-b", "base", "-F", "raw"]
    ok(qemu_img("create", "-q", "-f", format, *words, path, str(SIZE), cwd=tmp_path))
    ok_io = shell(f"qemu-io -f {format} -c 'write -P 7 4M 5M' {path}", tmp_path)
    assert ok_io.returncode == 0, ok_io.stderr
    return path


def assert_holds(image: Path, data: bytes | bytearray) -> None:
    """QEMU finds the image sound, and this content in it."""
    if image.suffix != ".raw":
        found = qemu_img("check", image, cwd=image.parent)
        assert found.returncode == 0, found.stdout + found.stderr
    flat = image.with_name("flat")
    flat.write_bytes(data)
    same = qemu_img("compare", "-f", "raw", flat, "-F", image.suffix[1:], image, cwd=image.parent)
    assert same.returncode == 0, same.stdout + same.stderr


@contextmanager
def opened(flat: Path) -> Iterator[int]:
    descriptor = os.open(flat, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def files_of(image: Path) -> list[Path]:
    return [path for path in (image, image.with_name("data")) if path.exists()]


def test_holes_zeros_and_data(mount: Mounts, image: Path) -> None:
    mounted = mount(image)
    flat = mounted.flat("disk")
    model = bytearray(flat.read_bytes())
    with opened(flat) as descriptor:
        for mode, offset, length in (
            (PUNCH_HOLE, 0, MIB),
            (PUNCH_HOLE, 5 * MIB + 1000, MIB),
            (ZERO_RANGE, 8 * MIB, 2 * MIB),
            (ZERO_RANGE | KEEP_SIZE, 7 * MIB - 100, 300),
            (PUNCH_HOLE, SIZE - 5000, 10_000),
            (ZERO_RANGE | KEEP_SIZE, SIZE - 70_000, 100_000),
        ):
            fallocate(descriptor, mode, offset, length)
            end = min(offset + length, SIZE)
            model[offset:end] = bytes(end - offset)
            assert os.pread(descriptor, SIZE, 0) == model
        fallocate(descriptor, 0, 0, SIZE)
        fallocate(descriptor, KEEP_SIZE, SIZE, MIB)
        for mode in (0, ZERO_RANGE):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                fallocate(descriptor, mode, SIZE - MIB, MIB + 1)
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            fallocate(descriptor, COLLAPSE_RANGE, 0, MIB)
        assert os.fstat(descriptor).st_size == SIZE
        assert os.pread(descriptor, SIZE, 0) == model
        # what is not reported as data is zeros
        os.fsync(descriptor)
        position = 0
        for start, end in [*data_ranges(flat), (SIZE, SIZE)]:
            assert not any(model[position:start])
            position = end
    mounted.umount()
    assert_holds(image, model)


def test_space_is_given_back_and_used_again(request: pytest.FixtureRequest, mount: Mounts, image: Path) -> None:
    mounted = mount("-o", "no-copy-on-read", image)
    flat = mounted.flat("disk")
    rnd = random.Random(3)
    model = bytearray(flat.read_bytes())
    with opened(flat) as descriptor:
        used = []
        for _ in range(4):
            for offset in range(0, 12 * MIB, MIB):
                model[offset : offset + MIB] = rnd.randbytes(MIB)
                os.pwrite(descriptor, model[offset : offset + MIB], offset)
            fallocate(descriptor, PUNCH_HOLE, 0, 16 * MIB)
            model[:] = bytes(SIZE)
            os.fsync(descriptor)
            # what this flush has freed is a matter of the next one, as far as counts go
            os.fsync(descriptor)
            used.append(sum(map(allocated, files_of(image))))
        assert used[-1] < MIB, used
    assert data_ranges(flat) == []
    mounted.umount()
    assert_holds(image, model)
    if image.suffix == ".qcow2" and len(files_of(image)) == 1 and "v2" not in request.node.name:
        assert image.stat().st_size < 16 * MIB, "freed clusters were used again"


def test_zeros_of_file_after_file_are_given_back_though_they_share_clusters(
    request: pytest.FixtureRequest, mount: Mounts, image: Path
) -> None:
    mounted = mount("-o", "no-copy-on-read", image)
    flat = mounted.flat("disk")
    with opened(flat) as descriptor:
        os.pwrite(descriptor, os.urandom(4 * MIB), 0)
        os.fsync(descriptor)
        for start in range(0, 9 * MIB, 20 * KIB):
            fallocate(descriptor, PUNCH_HOLE, start, min(20 * KIB, 9 * MIB - start))
        os.fsync(descriptor)
        os.fsync(descriptor)
    assert sum(map(allocated, files_of(image))) < MIB
    assert flat.read_bytes()[: 9 * MIB] == bytes(9 * MIB)
    mounted.umount()
    if image.suffix == ".qcow2" and not image.with_name("data").exists() and "v2" not in request.node.name:
        extents = ok(qemu_img("map", image))
        assert not [line for line in extents.splitlines() if line.endswith("disk.qcow2")], extents


def test_holes_tell_of_what_the_kernel_has_not_written_yet(mount: Mounts, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "1G"))
    flat = mount(path).flat("disk")
    with opened(flat) as descriptor:
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(descriptor, 0, os.SEEK_DATA)
        os.pwrite(descriptor, b"in the page cache", 700 * MIB)
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == 700 * MIB
        assert os.lseek(descriptor, 700 * MIB, os.SEEK_HOLE) in (700 * MIB + 4 * KIB, 700 * MIB + 64 * KIB)
        os.pwrite(descriptor, b"y" * 64 * KIB, 700 * MIB)
        os.pwrite(descriptor, b"x" * 320 * KIB, 700 * MIB + 64 * KIB)
        assert os.lseek(descriptor, 700 * MIB, os.SEEK_HOLE) == 700 * MIB + 384 * KIB
        with mmap.mmap(descriptor, MIB, offset=900 * MIB) as mapped:
            mapped[:4] = b"mmap"
            assert os.lseek(descriptor, 800 * MIB, os.SEEK_DATA) == 900 * MIB
            assert mapped[:4] == b"mmap"
        assert os.pread(descriptor, 1, 700 * MIB) == b"y"
        for offset in (1 << 30, 1 << 40):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                    os.lseek(descriptor, offset, whence)


def test_views_of_layers_and_control_files(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    base = mounted.control("overlay", "layers") / "0"
    with opened(mounted.flat("overlay")) as descriptor:
        fallocate(descriptor, PUNCH_HOLE, 0, 64 * MIB)
    assert data_ranges(base) == [(0, 64 * MIB)]
    assert data_ranges(mounted.control("overlay", "layers") / "1") == []
    with opened(mounted.control("overlay", "resize")) as descriptor:
        with pytest.raises(PermissionError):
            fallocate(descriptor, PUNCH_HOLE, 0, 10)
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(descriptor, 0, os.SEEK_DATA)


@pytest.mark.parametrize(
    "command",
    [
        "cp --sparse=auto {flat} {copy}",
        "tar -C {folder} -cSf {tar} {name} && tar -C {out} -xSf {tar}",
        "qemu-img convert -f raw -O raw {flat} {copy}",
    ],
    ids=["cp", "tar", "qemu-img"],
)
def test_copies_have_the_data_alone(mount: Mounts, tmp_path: Path, command: str) -> None:
    """A disk of which all could not even be read in the time."""
    path = tmp_path / "disk.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "1T"))
    data = os.urandom(MIB)
    assert shell(f"qemu-io -c 'write -P 3 500G 1M' -c 'write -P 4 1023G 128k' {path}").returncode == 0
    flat = mount(path).flat("disk")
    with open(flat, "r+b") as file:
        file.seek(3 << 30)
        file.write(data)
        file.flush()
        out = tmp_path / "out"
        out.mkdir()
        copy = out / "disk"
        made = shell(
            command.format(flat=flat, copy=copy, folder=flat.parent, name="disk", out=out, tar=tmp_path / "tar")
        )
        assert made.returncode == 0, made.stderr
    assert copy.stat().st_size == 1 << 40
    assert allocated(copy) <= 4 * MIB
    with open(copy, "rb") as file:
        for offset, expected in ((3 << 30, data), (500 << 30, b"\3" * MIB), (1023 << 30, b"\4" * 128 * KIB)):
            file.seek(offset)
            assert file.read(len(expected)) == expected


def test_the_control_file(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    flat, control = mounted.flat("overlay"), mounted.control("overlay", "discard")
    model = bytearray(flat.read_bytes())
    assert control.read_text() == "65536\n"
    with open(flat, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"not written back yet")
        file.flush()
        model[5 * MIB : 5 * MIB + 20] = b"not written back yet"
        control.write_text("1M 4M\n")
        model[MIB : 5 * MIB] = bytes(4 * MIB)
        assert flat.read_bytes() == model
        file.seek(2 * MIB)
        file.write(b"to be given up before the kernel writes it")
        file.flush()
        control.write_text("2M 1k")
        assert flat.read_bytes() == model
        control.write_text("5242880 10")
        model[5 * MIB : 5 * MIB + 10] = bytes(10)
        assert flat.read_bytes() == model
    for text, number in (
        ("1M", errno.EINVAL),
        ("1M -4k", errno.EINVAL),
        ("0 1 2", errno.EINVAL),
        ("63M 2M", errno.EFBIG),
        ("64M 0", 0),
        ("8E 1", errno.EINVAL),
    ):
        descriptor = os.open(control, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
            assert not number, text
        except OSError as error:
            assert error.errno == number, text
        finally:
            os.close(descriptor)
    mounted.umount()
    assert_holds(overlay, model)


def test_a_read_only_mount_discards_nothing(mount: Mounts, overlay: Path) -> None:
    mounted = mount("-o", "ro", overlay)
    with pytest.raises(OSError, match="Read-only"):
        mounted.control("overlay", "discard").write_text("0 1M")
    assert data_ranges(mounted.flat("overlay")) == [(0, 64 * MIB)]


@pytest.mark.needs("losetup", "loop", "blkdiscard")
def test_blkdiscard(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    model = bytearray(flat.read_bytes())
    with loop_on(flat) as device:
        name = Path(device).name
        queue = Path("/sys/block") / name / "queue"
        assert int((queue / "discard_max_bytes").read_text()) > 0
        assert int((queue / "discard_granularity").read_text()) == 64 * KIB
        for options, offset, length in (("", 8 * MIB, 16 * MIB), ("-z", 30 * MIB + 4096, 10 * MIB)):
            made = shell(f"blkdiscard {options} -o {offset} -l {length} {device}")
            assert made.returncode == 0, made.stderr
            model[offset : offset + length] = bytes(length)
        assert Path(device).read_bytes() == model
    assert flat.read_bytes() == model
    assert not [r for r in data_ranges(flat) if r[0] < 24 * MIB and r[1] > 8 * MIB]
    mounted.umount()
    assert_holds(overlay, model)


@pytest.mark.needs("losetup", "loop", "mkfs.ext4", "fstrim")
@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_fstrim_shrinks_the_overlay_to_what_is_used(mount: Mounts, tmp_path: Path, format: str) -> None:
    size = 512 * MIB
    with open(tmp_path / "base", "wb") as file:
        file.truncate(size)
    path = tmp_path / f"disk.{format}"
    ok(qemu_img("create", "-q", "-f", format, "-b", "base", "-F", "raw", path, cwd=tmp_path))
    mounted = mount("-o", "flush-interval=0.5", path)
    with file_system(mounted, "disk", tmp_path) as ext4:
        kept = os.urandom(20 * MIB)
        (ext4.root / "kept").write_bytes(kept)
        for number in range(10):
            (ext4.root / f"gone{number}").write_bytes(os.urandom(20 * MIB))
        ext4.run("sync")
        before = allocated(path)
        assert before > 200 * MIB
        for number in range(10):
            (ext4.root / f"gone{number}").unlink()
        ext4.run("sync; fstrim -v {root}; sync")
        goal = ext4.used() * 1.1 + 2 * MIB
        wait_for("the overlay to shrink", lambda: allocated(path) < goal)
        assert (ext4.root / "kept").read_bytes() == kept
        ext4.run("e2fsck -fn {device} > /dev/null || true")
    mounted.umount()
    assert qemu_img("check", path).returncode == 0


@pytest.mark.needs("losetup", "loop", "mkfs.ext4", "fstrim")
def test_churn_of_files_with_discards_does_not_let_the_overlay_grow(mount: Mounts, tmp_path: Path) -> None:
    """Written, trimmed and deleted several times the size of what is ever there at once, with a stream in between."""
    size = 256 * MIB
    with open(tmp_path / "base", "wb") as file:
        file.truncate(size)
        file.write(os.urandom(8 * MIB))
    path = tmp_path / "disk.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", path, cwd=tmp_path))
    rnd = random.Random(8)
    contents: dict[str, bytes] = {}
    mounted = mount("-o", "flush-interval=0.2", path)
    with file_system(mounted, "disk", tmp_path, "discard") as ext4:
        for number in range(120):
            name = f"file{number}"
            contents[name] = os.urandom(rnd.randrange(1000, 3 * MIB))
            (ext4.root / name).write_bytes(contents[name])
            while sum(map(len, contents.values())) > 30 * MIB:
                gone = rnd.choice(sorted(contents))
                (ext4.root / gone).unlink()
                del contents[gone]
            if not number % 20:
                ext4.run("sync; fstrim {root}")
            if number == 60:
                mounted.control("disk", "stream").write_text("start")
        ext4.run("sync; fstrim {root}; sync")
        assert mounted.job_ended("disk", "stream")["state"] == "completed"
        goal = ext4.used() * 1.1 + 2 * MIB
        wait_for("the overlay to be as small as what is used", lambda: allocated(path) < goal)
        for name, data in contents.items():
            assert (ext4.root / name).read_bytes() == data, name
    mounted.umount()
    assert qemu_img("check", path).returncode == 0

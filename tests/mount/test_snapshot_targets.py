"""Snapshots onto what is there already: block devices, and overlays that were prepared."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounted, Mounts, shell

pytestmark = pytest.mark.needs("root", "fuse", "loop", "losetup", "qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def active(tmp_path: Path) -> Path:
    path = tmp_path / "active.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", path, str(SIZE)))
    qemu_io(path, "qcow2", "write -P 1 0 1M")
    return path


@contextmanager
def loop_on(path: Path) -> Iterator[str]:
    """A loop device on a file."""
    device = shell(f"losetup --find --show {path}").stdout.strip()
    assert device
    try:
        yield device
    finally:
        assert shell(f"losetup --detach {device}").returncode == 0


def write(mounted: Mounted, offset: int, data: bytes) -> None:
    with mounted.flat("active").open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def facts(image: Path | str) -> dict[str, object]:
    found: dict[str, object] = json.loads(ok(qemu_img("info", "-U", "-f", "qcow2", "--output=json", image)))
    return found


def prepare(active: Path, path: Path, *words: str | Path, size: int = SIZE, format: str = "qcow2") -> Path:
    ok(qemu_img("create", "-q", "-u", "-f", format, *words, path, str(size)))
    return path


def test_a_block_device_is_formatted(mount: Mounts, active: Path, tmp_path: Path) -> None:
    disk = tmp_path / "device"
    # what it holds counts for nothing, as with create
    disk.write_bytes(os.urandom(16 * MIB))
    mounted = mount(active)
    with loop_on(disk) as device:
        ok(cowfs("snapshot", "-q", "-c", device, mounted.flat("active")))
        assert mounted.control("active", "snapshot").read_text() == f"{device}\n"
        write(mounted, MIB // 2, b"2" * MIB)
        seen = mounted.flat("active").read_bytes()
        mounted.umount()
        assert facts(device)["backing-filename"] == str(active)
        ok(qemu_img("check", "-q", "-f", "qcow2", device))
        ok(qemu_img("convert", "-f", "qcow2", "-O", "raw", device, tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == seen
        # the old image is what it was
        ok(qemu_img("convert", "-O", "raw", active, tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == b"\1" * MIB + bytes(SIZE - MIB)


def test_devices_that_are_in_use_or_too_small_are_left_alone(mount: Mounts, active: Path, tmp_path: Path) -> None:
    disk, small = tmp_path / "device", tmp_path / "small"
    disk.write_bytes(bytes(16 * MIB))
    small.write_bytes(b"x" * 4096)
    assert shell(f"mkfs.ext4 -q {disk}").returncode == 0
    before = disk.read_bytes()
    mounted = mount(active)
    flat = mounted.flat("active")
    with loop_on(disk) as device, loop_on(small) as tiny:
        point = tmp_path / "point"
        point.mkdir()
        assert shell(f"mount -o ro {device} {point}").returncode == 0
        try:
            assert "is in use: it is mounted" in refusal(cowfs("snapshot", "-q", "-c", device, flat))
            assert "is in use: it is mounted" in refusal(cowfs("create", "-q", "-f", "qcow2", device, "1M"))
        finally:
            assert shell(f"umount {point}").returncode == 0
        assert "device is too small" in refusal(cowfs("snapshot", "-q", "-c", tiny, flat))
        assert Path(tiny).exists(), "the device's name is not removed"
        ok(cowfs("snapshot", "-q", "-c", device, flat))
        # a device of the chain, by another name
        (tmp_path / "alias").symlink_to(device)
        for name in (device, tmp_path / "alias"):
            assert "is part of a disk already" in refusal(cowfs("snapshot", "-q", "-c", name, flat))
        mounted.umount()
    assert small.read_bytes() == b"x" * 4096
    assert disk.read_bytes() != before


@pytest.mark.parametrize("format", ["qcow2", "qed"])
@pytest.mark.parametrize("names", ["absolute", "relative", "none", "json"])
def test_a_prepared_overlay_becomes_active(
    mount: Mounts, active: Path, tmp_path: Path, format: str, names: str
) -> None:
    recorded = {
        "absolute": str(active),
        "relative": f"../{active.name}",
        "json": f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{active}"}}}}',
    }.get(names)
    (tmp_path / "sub").mkdir()
    words = ["-b", recorded, "-F", "qcow2"] if recorded else []
    ready = prepare(active, tmp_path / "sub/ready", *words, format=format)
    mounted = mount(active)
    mounted.control("active", "snapshot").write_text(f"create sub/ready format={format} reuse-external=yes\n")
    write(mounted, MIB // 2, b"2" * MIB)
    seen = mounted.flat("active").read_bytes()
    assert len(mounted.control("active", "chain").read_text().splitlines()) == 2
    mounted.umount()
    found = json.loads(ok(qemu_img("info", "-f", format, "--output=json", ready)))
    assert found["backing-filename"] == (recorded or str(active))
    ok(qemu_img("check", "-q", "-f", format, ready))
    ok(qemu_img("convert", "-f", format, "-O", "raw", ready, tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == seen


def test_a_prepared_device_and_a_name_of_the_users_choice(mount: Mounts, active: Path, tmp_path: Path) -> None:
    disk = tmp_path / "device"
    disk.write_bytes(bytes(16 * MIB))
    mounted = mount(active)
    with loop_on(disk) as device:
        prepare(active, Path(device))
        words = ["--reuse-external", "--backing-names", "relative"]
        ok(cowfs("snapshot", "-q", "-c", device, *words, mounted.flat("active")))
        write(mounted, 0, b"3" * 512)
        mounted.umount()
        assert facts(device)["backing-filename"] == os.path.relpath(active, "/dev")
        ok(qemu_img("compare", "-q", "-f", "qcow2", device, device))


def _other_size(active: Path, path: Path) -> None:
    prepare(active, path, "-b", active, "-F", "qcow2", size=SIZE + 512)


def _other_backing(active: Path, path: Path) -> None:
    other = prepare(active, path.with_name("other.qcow2"))
    prepare(active, path, "-b", other, "-F", "qcow2")


def _gone_backing(active: Path, path: Path) -> None:
    prepare(active, path, "-b", "nowhere", "-F", "qcow2")


def _other_backing_format(active: Path, path: Path) -> None:
    prepare(active, path, "-b", active, "-F", "raw")


def _with_data(active: Path, path: Path) -> None:
    prepare(active, path)
    qemu_io(path, "qcow2", "write -P 9 4M 512")


def _with_zeros(active: Path, path: Path) -> None:
    prepare(active, path)
    qemu_io(path, "qcow2", "write -z 4M 64k")


def _with_snapshot(active: Path, path: Path) -> None:
    ok(qemu_img("snapshot", "-c", "s", prepare(active, path)))


def _of_another_format(active: Path, path: Path) -> None:
    prepare(active, path, format="qed")


def _no_image(active: Path, path: Path) -> None:
    path.write_bytes(bytes(4096))


def _itself(active: Path, path: Path) -> None:
    path.symlink_to(active)


def _part(active: Path, path: Path) -> None:
    name = f'json:{{"driver":"qcow2","file":{{"driver":"raw","offset":0,"size":65536,"file.filename":"{active}"}}}}'
    prepare(active, path, "-b", name, "-F", "qcow2")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_other_size, "has a disk of 8389120 bytes"),
        (_other_backing, "which is not"),
        (_gone_backing, "which is not"),
        (_other_backing_format, "is raw, and"),
        (_with_data, "holds something already"),
        (_with_zeros, "holds something already"),
        (_with_snapshot, "internal snapshots"),
        (_of_another_format, "qcow2"),
        (_no_image, "qcow2"),
        (_itself, "is part of a disk already"),
        (_part, "which is not"),
    ],
)
def test_what_does_not_fit_is_refused_and_stays_as_it_is(
    mount: Mounts, active: Path, tmp_path: Path, make: Callable[[Path, Path], None], says: str
) -> None:
    ready = tmp_path / "ready"
    make(active, ready)
    mounted = mount(active)
    write(mounted, 2 * MIB, b"4" * 512)
    before = ready.read_bytes()
    sentence = refusal(cowfs("snapshot", "-c", ready, "--reuse-external", mounted.flat("active")))
    assert says in sentence
    assert str(ready) in sentence
    assert ready.read_bytes() == before
    assert len(mounted.control("active", "chain").read_text().splitlines()) == 1
    # and without being asked for, nothing that exists is taken
    assert refusal(cowfs("snapshot", "-c", ready, mounted.flat("active"))).endswith("exists already")
    write(mounted, 0, b"5" * 512)
    mounted.umount()
    ok(qemu_img("check", "-q", active))


def test_what_somebody_uses_is_refused(mount: Mounts, active: Path, tmp_path: Path) -> None:
    ready = prepare(active, tmp_path / "ready.qcow2", "-b", active, "-F", "qcow2")
    free = prepare(active, tmp_path / "free.qcow2")
    mounted = mount("-o", "nolock", active, f"other={free}")
    assert "is part of a disk already" in refusal(
        cowfs("snapshot", "-c", free, "--reuse-external", mounted.flat("active"))
    )
    mounted.umount()
    mounted, holder = mount(active), mount(f"second={free}")
    assert "in use by" in refusal(cowfs("snapshot", "-c", free, "--reuse-external", mounted.flat("active")))
    holder.umount()
    for word in ("maybe", ""):
        with pytest.raises(OSError):
            mounted.control("active", "snapshot").write_text(f"create {ready} reuse-external={word}")
    assert "is not one of no, yes" in mounted.control("active", "error").read_text()
    ok(cowfs("snapshot", "-q", "-c", ready, "--reuse-external", mounted.flat("active")))
    assert "is for disks of a mount" in refusal(cowfs("snapshot", "--reuse-external", "-c", "x", free))


def test_a_prepared_overlay_without_the_format_of_its_backing_file_gets_it(mount: Mounts, tmp_path: Path) -> None:
    """Else the next one would guess it, of a disk that guests write to."""
    raw = tmp_path / "active.raw"
    raw.write_bytes(b"\6" * SIZE)
    ready = tmp_path / "ready.qcow2"
    ok(cowfs("create", "-q", "-f", "qcow2", "-u", "-b", raw, ready, str(SIZE)))
    mounted = mount("-o", "format=raw", raw)
    ok(cowfs("snapshot", "-q", "-c", ready, "--reuse-external", mounted.flat("active")))
    mounted.umount()
    assert facts(ready)["backing-filename-format"] == "raw"
    assert facts(ready)["backing-filename"] == str(raw)

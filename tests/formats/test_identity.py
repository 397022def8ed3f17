"""A base that has changed under its overlays is told from one that has not."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounts

from cowfs.block import identity
from cowfs.block.image import Backing
from cowfs.errors import BaseChanged
from cowfs.formats.chain import Opening, open_chain, open_disk, open_image
from cowfs.formats.create import create_image
from cowfs.formats.qed.stamp import stamp_place

MIB = 1 << 20
FORMATS = {"qcow2": "qcow2", "qcow2-v2": "qcow2", "qed-4k": "qed"}
OPTIONS = {"qcow2-v2": "compat=0.10", "qed-4k": "cluster_size=4k"}


@pytest.fixture(params=FORMATS)
def overlay(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An overlay that cowfs has made, on a qcow2 image with data."""
    base = tmp_path / "base.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", base, "64M"))
    qemu_io(base, "qcow2", "write -P 1 0 4M", "write -P 2 40M 4M")
    path = tmp_path / "overlay"
    options = ["-o", OPTIONS[request.param]] if request.param in OPTIONS else []
    ok(cowfs("create", "-q", "-f", FORMATS[request.param], *options, "-b", base, "-F", "qcow2", path))
    ok(qemu_img("check", "-q", path))
    return path


def base_of(overlay: Path) -> Path:
    return overlay.with_name("base.qcow2")


def keep_time(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "size": lambda base: os.truncate(base, base.stat().st_size + 65536),
    "time": os.utime,
    "data": lambda base: qemu_io(base, "qcow2", "write -P 9 30M 64k"),
    "shrunk": lambda base: qemu_img("resize", "-q", "--shrink", base, "32M"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changed_is_refused_until_it_is_accepted(overlay: Path, change: str) -> None:
    ok(cowfs("map", overlay))
    CHANGES[change](base_of(overlay))
    before = overlay.read_bytes()
    for sentence in (refusal(cowfs("map", overlay)), refusal(cowfs("compare", overlay, overlay), 2)):
        assert f"its backing file {base_of(overlay)} has changed since this image was put on it" in sentence
        assert f"cowfs verify --accept {overlay}" in sentence
    ok(cowfs("map", "-U", overlay))
    assert overlay.read_bytes() == before
    result = cowfs("verify", overlay)
    assert result.returncode == 1 and "has changed" in result.stdout
    # what tells nothing of the disk's content still does
    ok(cowfs("info", "--backing-chain", overlay))
    ok(cowfs("check", overlay))
    ok(cowfs("verify", "--accept", overlay))
    ok(cowfs("map", overlay))
    assert "every byte" in ok(cowfs("verify", overlay))
    ok(qemu_img("check", "-q", overlay))


def test_bytes_between_the_samples_are_found_by_verify_alone(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(random.Random(1).randbytes(16 * MIB))
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay))
    assert "no digest of all bytes" in ok(cowfs("verify", overlay))
    ok(cowfs("verify", "-q", "--accept", overlay))
    status = base.stat()
    with base.open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"x")
    keep_time(base, status)
    ok(cowfs("map", overlay))
    result = cowfs("verify", overlay)
    assert (result.returncode, "its content is another" in result.stdout) == (1, True)


def test_a_copy_with_another_time_is_known_by_its_bytes(overlay: Path, tmp_path: Path) -> None:
    ok(cowfs("verify", "-q", "--accept", overlay))
    os.utime(base_of(overlay), ns=(1, 2 * 10**18))
    assert "every byte" in ok(cowfs("verify", overlay))
    # a copy that has lost fractions of a second, as some programs make it, is no other
    ok(cowfs("verify", "-q", "--accept", overlay))
    os.utime(base_of(overlay), ns=(1, 2 * 10**18 + 5))
    ok(cowfs("map", overlay))


def test_deep_in_the_chain(overlay: Path, mount: Mounts) -> None:
    top = overlay.with_name("top.qcow2")
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", overlay, "-F", ok_format(overlay), top))
    os.utime(base_of(overlay))
    sentence = refusal(cowfs("mount", top, mount.new_point()))
    assert sentence.startswith(f"{overlay}: its backing file {base_of(overlay)} has changed")
    mount("-o", "accept-base", top).umount()
    assert refusal(cowfs("map", top))
    ok(cowfs("verify", "-q", "--accept", top))
    ok(cowfs("map", top))


def test_a_disk_of_a_mount_is_the_same_when_it_is_mounted_again(mount: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "2M"))
    os.utime(image, ns=(1, 10**18 + 7))
    point = mount.new_point()
    first = mount(image, point=point)
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", point / "disk", "-F", "raw", tmp_path / "overlay"))
    assert (point / "disk").stat().st_mtime_ns == (point / ".cowfs/disk/layers/0").stat().st_mtime_ns == 10**18 + 7
    first.umount()
    second = mount(image, point=point)
    ok(cowfs("map", tmp_path / "overlay"))
    with (point / "disk").open("r+b") as disk:
        disk.write(b"new")
    assert "has changed" in refusal(cowfs("map", tmp_path / "overlay"))
    second.umount()


def ok_format(path: Path) -> str:
    return "qed" if path.read_bytes()[:3] == b"QED" else "qcow2"


def test_the_first_mount_remembers_and_accept_base_remembers_anew(mount: Mounts, tmp_path: Path) -> None:
    for format in ("qcow2", "qed"):
        base, overlay = tmp_path / f"{format}.raw", tmp_path / f"{format}.overlay"
        base.write_bytes(os.urandom(MIB))
        ok(qemu_img("create", "-q", "-f", format, "-b", base, "-F", "raw", overlay))
        mount("-o", "ro", overlay).umount()
        os.utime(base, ns=(1, 10**18))
        mount(overlay).umount()
        os.utime(base, ns=(1, 10**18 + 10**9))
        assert "has changed" in refusal(cowfs("mount", overlay, mount.new_point()))
        mount("-o", "accept-base", overlay).umount()
        mount(overlay).umount()
        ok(qemu_img("check", "-q", overlay))


def test_qemu_keeps_the_stamp_and_it_says_nothing_of_another_backing_file(overlay: Path) -> None:
    copy = overlay.with_name("copy.qcow2")
    shutil.copy(base_of(overlay), copy)
    qemu_io(overlay, ok_format(overlay), "write -P 7 1M 1M", "write -P 8 50M 1M")
    ok(qemu_img("resize", "-q", overlay, "65M"))
    os.utime(base_of(overlay))
    assert "has changed" in refusal(cowfs("map", overlay))
    ok(qemu_img("rebase", "-u", "-b", copy, "-F", "qcow2", overlay))
    ok(cowfs("map", overlay))
    assert "is not remembered" in ok(cowfs("verify", overlay))
    ok(qemu_img("check", "-q", overlay))


async def test_dropping_the_backing_file_drops_the_stamp(overlay: Path) -> None:
    image = await open_image(str(overlay), writable=True)
    assert image.stamp is not None
    await image.set_backing(None)
    await image.close()
    image = await open_image(str(overlay))
    assert (image.stamp, image.backing) == (None, None)
    await image.close()
    ok(qemu_img("check", "-q", overlay))


def test_a_commit_forgets_the_base_while_it_writes_to_it(mount: Mounts, overlay: Path) -> None:
    mounted = mount(overlay)
    with mounted.flat("overlay").open("r+b") as file:
        file.seek(20 * MIB)
        file.write(os.urandom(MIB))
    ok(cowfs("commit", mounted.flat("overlay")))
    mounted.umount()
    assert "by size, time and samples" in ok(cowfs("verify", overlay))


async def test_while_the_base_is_open_for_writing_nothing_is_remembered(overlay: Path) -> None:
    disk = await open_disk(str(overlay), writable=True)
    await disk.set_layer_writable(1, True)
    # as after a crash
    image = await open_image(str(overlay), opening=Opening(locking=False))
    assert image.stamp is None
    await image.close()
    await disk.set_layer_writable(1, False)
    await disk.close()
    image = await open_image(str(overlay))
    assert image.stamp is not None
    await image.close()


@pytest.mark.parametrize("damage", ["short", "bits", "version"])
async def test_a_stamp_that_makes_no_sense_counts_for_none(overlay: Path, damage: str) -> None:
    image = await open_image(str(overlay), writable=True)
    assert image.stamp is not None
    stamp = bytearray(image.stamp)
    await image.set_stamp(
        {
            "short": bytes(stamp[:-1]),
            "bits": bytes([*stamp[:30], stamp[30] ^ 1, *stamp[31:]]),
            "version": b"\x02" + bytes(stamp[1:]),
        }[damage]
    )
    await image.close()
    os.utime(base_of(overlay))
    ok(cowfs("map", overlay))


async def test_qed_header_clusters_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qed"
    base.write_bytes(bytes(MIB))
    ok(qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", overlay))
    image = await open_image(str(overlay), "qed", writable=True)
    place = stamp_place(image.header)  # type: ignore[attr-defined]
    await image.storage.write(place, [b"somebody else's"])
    assert not await image.set_stamp(b"stamp")
    assert (await image.storage.read_bytes(place, 15)) == b"somebody else's"
    await image.close()


async def test_a_cluster_of_512_bytes_has_no_room_and_does_without(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(bytes(MIB))
    name = "x" * 200
    (tmp_path / name).write_bytes(bytes(MIB))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", name, "-F", "raw", overlay))
    disk = await open_disk(str(overlay), writable=True)
    await identity.remember(disk.layers[0], disk.layers[1])
    await disk.write(4096, b"x" * 4096)
    await disk.close()
    ok(qemu_img("check", "-q", overlay))


async def test_the_error_is_the_one_of_stale_files(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(bytes(MIB))
    await create_image(str(overlay), "qcow2", None, Backing(str(base), "raw"))
    os.truncate(base, 2 * MIB)
    with pytest.raises(BaseChanged) as caught:
        await open_chain(str(overlay))
    assert caught.value.errno == errno.ESTALE
    assert "it had 1048576 bytes, and now has 2097152" in str(caught.value)
    for layer in await open_chain(str(overlay), opening=Opening(trusting=True)):
        await layer.close()

"""Virtual machines that run from a mounted disk, while its chain changes under them."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from guests import DELETED, ZEROS, Guest, Guests, make_initramfs, make_root
from mounting import Mounted, Mounts, wait_for_end

pytestmark = pytest.mark.needs(
    *("root", "fuse", "guest-kernel", "qemu-system-x86_64", "qemu-img", "busybox", "cpio", "mkfs.ext4", "debugfs")
)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def layers(mounted: Mounted) -> list[str]:
    return [Path(line.split(" ", 3)[3]).name for line in mounted.control("vm", "chain").read_text().splitlines()]


def change_the_chain(guest: Guest, mounted: Mounted) -> None:
    """Stream, live snapshot, commit with pivot; the guest works before, during and after each."""
    flat = mounted.flat("vm")
    guest.works_on()
    assert layers(mounted)[1:] == ["base.raw"]
    ok(cowfs("stream", "-q", flat))
    assert len(layers(mounted)) == 1
    guest.works_on()
    ok(cowfs("snapshot", "-q", "-c", "later.qcow2", flat))
    assert layers(mounted)[0] == "later.qcow2"
    guest.works_on()
    ok(cowfs("commit", "-q", "--pivot", flat))
    assert len(layers(mounted)) == 1
    assert "later.qcow2" not in layers(mounted)
    guest.works_on()


def assert_file_system(disk: Path, directory: Path, sums: str) -> None:
    """The host finds the guest's file system sound, and its files are what the guest said they are."""
    checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    directory.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump /data {directory}", disk], capture_output=True, check=True)
    lists = sorted((directory / "data").glob("*.sum"), key=lambda path: path.name)
    assert len(lists) > 5
    text = "".join(path.read_text() for path in lists)
    assert hashlib.sha256(text.encode()).hexdigest() == sums
    for line in text.splitlines():
        expected, name = line.split()
        assert digest(directory / name.removeprefix("/")) == expected, name


def stored(image: Path) -> int:
    """Bytes of the disk that the image stores as data, by QEMU's word."""
    (part,) = re.findall(r"(\d+)/\d+ = ", qemu_img("check", image).stdout)
    return int(part) << 16


def used(disk: Path) -> int:
    """Bytes that the guest's file system counts as used."""
    facts = subprocess.run(["dumpe2fs", "-h", disk], capture_output=True, text=True, check=True).stdout
    blocks, free, size = (
        int(re.findall(rf"^{name}: +(\d+)$", facts, re.MULTILINE)[0])
        for name in ("Block count", "Free blocks", "Block size")
    )
    return (blocks - free) * size


@pytest.mark.parametrize(
    ("format", "drive"),
    [
        ("qcow2", "cache=none,aio=native"),
        ("qcow2", "cache=none,aio=io_uring"),
        ("qed", "cache=writeback"),
        ("qcow2", "discard=unmap,detect-zeroes=unmap"),
    ],
)
def test_a_guest_notices_nothing(mount: Mounts, guests: Guests, tmp_path: Path, format: str, drive: str) -> None:
    base, image = tmp_path / "base.raw", tmp_path / f"vm.{format}"
    make_root(base)
    before = digest(base)
    ok(cowfs("create", "-q", "-f", format, "-b", base, "-F", "raw", image))
    mounted = mount(image)
    flat = mounted.flat("vm")

    guest = guests(make_initramfs(tmp_path), flat, drive)
    change_the_chain(guest, mounted)
    guest.shut_down()
    assert guest.said("files") == ["good"]
    assert guest.said("down") == ["yes"]
    assert guest.said("before") == guest.said("after")
    assert guest.said("before") == [digest(tmp_path / "base.root/in-the-base")]

    (sums,) = guest.said("sums")
    assert_file_system(flat, tmp_path / "seen-mounted", sums)
    content, needed = digest(flat), used(flat)
    mounted.umount()
    wait_for_end(mounted.process)
    assert digest(base) == before
    checked = qemu_img("check", image)
    assert checked.returncode == 0, checked
    plain = tmp_path / "plain.raw"
    ok(qemu_img("convert", "-O", "raw", image, plain))
    assert digest(plain) == content
    assert_file_system(plain, tmp_path / "seen-by-qemu", sums)
    if "unmap" in drive:
        assert guest.said("trimmed") == ["yes"]
        assert stored(image) < needed - ZEROS + DELETED // 4

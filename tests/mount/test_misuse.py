"""What people and programs do to a mount that it is not made for: nothing is lost, and it says what is wrong."""

import os
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from mounting import Mounts, shell

pytestmark = pytest.mark.needs("root", "fuse")


def test_opening_with_truncation_is_refused_and_changes_nothing(mount: Mounts, overlay: Path) -> None:
    mounted = mount(f"d={overlay}")
    flat = mounted.flat("d")
    content = flat.read_bytes()
    for command in (": > mount0/d", "cp /dev/null mount0/d", "dd if=/dev/zero of=mount0/d bs=1k count=1"):
        refused = shell(command, overlay.parent)
        assert refused.returncode != 0
        assert "Operation not permitted" in refused.stderr
        assert flat.stat().st_size == len(content)
    assert "O_TRUNC" in mounted.control("d", "error").read_text()
    assert flat.read_bytes() == content
    with flat.open("r+b") as file:
        file.write(b"in place")
    mounted.umount()
    ok(qemu_img("check", overlay))


def test_handles_of_a_removed_disk_say_so(mount: Mounts, overlay: Path, raw_image: Path) -> None:
    mounted = mount(f"a={overlay}", f"b={raw_image}")
    names = ["status.json", "stream", "commit", "copy-on-read"]
    handles = [os.open(mounted.control("b", name), os.O_RDWR if name != "status.json" else 0) for name in names]
    ok(shell("echo remove b > mount0/.cowfs/control", overlay.parent))
    for name, handle in zip(names, handles, strict=True):
        with pytest.raises(FileNotFoundError):
            os.pread(handle, 100, 0)
        if name != "status.json":
            with pytest.raises(FileNotFoundError):
                os.write(handle, b"start")
        os.close(handle)
    mounted.umount()


@pytest.mark.parametrize("option", ["uid=4294967295", "gid=4294967296", "uid=99999999999999999999"])
def test_ids_that_cannot_be_are_refused(tmp_path: Path, raw_image: Path, option: str) -> None:
    (tmp_path / "point").mkdir()
    refused = cowfs("mount", "-o", option, raw_image, tmp_path / "point")
    assert refused.returncode != 0
    assert refused.stderr.count("\n") == 1
    assert "is not a number from 0 to 4294967294" in refused.stderr
    assert not os.path.ismount(tmp_path / "point")


def test_a_file_name_forges_no_lines(mount: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "evil\n1 raw 5 fake"
    image.write_bytes(bytes(4096))
    mounted = mount(f"d={image}")
    assert mounted.control("d", "chain").read_text().count("\n") == 1
    assert (mounted.point / ".cowfs" / "control").read_text().count("\n") == 1
    assert mounted.status()["images"][0]["name"] == "d"
    mounted.umount()


def test_a_command_has_a_limit(mount: Mounts, raw_image: Path) -> None:
    mounted = mount(f"d={raw_image}")
    with pytest.raises(OSError, match="Invalid argument"), mounted.control("d", "stream").open("wb", 0) as file:
        file.write(b"x" * 100_000)
    assert mounted.control("d", "error").read_text().strip() == "a command has at most 8192 bytes"
    mounted.umount()


def test_a_mount_is_found_through_a_link(mount: Mounts, raw_image: Path, tmp_path: Path) -> None:
    mounted = mount(f"d={raw_image}")
    (tmp_path / "link").symlink_to(mounted.point)
    assert "16 MiB" in ok(cowfs("status", tmp_path / "link"))
    mounted.umount()


def test_a_write_beyond_the_end_does_not_keep_the_mount(mount: Mounts, raw_image: Path) -> None:
    mounted = mount(f"d={raw_image}")
    failed = shell("dd if=/dev/zero of=mount0/d bs=1M seek=16 count=1 conv=notrunc", raw_image.parent)
    assert failed.returncode != 0
    mounted.umount()
    assert raw_image.stat().st_size == 16 << 20

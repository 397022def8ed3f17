"""Partitions on the loop device of a mounted disk."""

import os
from pathlib import Path

import pytest
from commandline import qemu_img
from filesystems import loop_on
from mounting import Mounted, Mounts, shell, wait_for

pytestmark = pytest.mark.needs("root", "fuse", "loop", "losetup", "sfdisk", "mkfs.ext4", "qemu-img")

MIB = 1 << 20
_TABLES = {"gpt": "label: gpt\n,24MiB,L\n,,L\n", "dos": "label: dos\n,24MiB,L\n,,E\n,8MiB,L\n"}


def wait_for_last_close(mounted: Mounted) -> None:
    wait_for("the last close", lambda: not mounted.status()["images"][0]["open-files"])


@pytest.mark.parametrize(("label", "second"), [("gpt", "p2"), ("dos", "p5")])
def test_partitions_come_and_stay(mount: Mounts, overlay: Path, tmp_path: Path, label: str, second: str) -> None:
    """They are there when a disk with a table is attached, also read-only, and what is written there stays."""
    data, more = os.urandom(6 * MIB), os.urandom(3 * MIB)
    (tmp_path / "table").write_text(_TABLES[label])
    mounted = mount(overlay)
    flat = mounted.flat("overlay")
    with loop_on(flat) as device:
        written = shell(f"wipefs -qa {device} && sfdisk -q {device} <{tmp_path}/table")
        assert written.returncode == 0, written.stderr
    with loop_on(flat) as device:
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree/file").write_bytes(data)
        made = shell(f"mkfs.ext4 -q -d {tmp_path}/tree {device}p1")
        assert made.returncode == 0, made.stderr
        with open(f"{device}{second}", "r+b") as partition:
            partition.write(more)
            partition.flush()
            os.fsync(partition.fileno())
    wait_for_last_close(mounted)
    mounted.umount()
    assert qemu_img("check", overlay).returncode == 0

    for options, read_only in (((), "0"), (("-o", "ro"), "1")):
        mounted = mount(*options, overlay)
        with loop_on(mounted.flat("overlay")) as device:
            assert Path(f"/sys/block/{Path(device).name}/ro").read_text() == f"{read_only}\n"
            checked = shell(f"e2fsck -fn {device}p1 && debugfs -R 'dump /file {tmp_path}/out' {device}p1")
            assert checked.returncode == 0, checked
            assert (tmp_path / "out").read_bytes() == data
            with open(f"{device}{second}", "rb") as partition:
                assert partition.read(len(more)) == more
        wait_for_last_close(mounted)
        mounted.umount()


def test_a_disk_without_partitions_is_attached_too(mount: Mounts, raw_image: Path) -> None:
    mounted = mount(raw_image)
    with loop_on(mounted.flat("plain")) as device:
        assert not list(Path("/dev").glob(f"{Path(device).name}p*"))
    wait_for_last_close(mounted)
    mounted.umount()

"""Logical volumes on a partition of a mounted disk, in a guest, whose kernel is known to have device-mapper."""

import hashlib
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from fallocating import allocated
from filesystems import loop_on
from guests import Guests, make_initramfs
from mounting import Mounts, shell, wait_for, wait_for_end

pytestmark = pytest.mark.needs(
    *("root", "fuse", "loop", "losetup", "sfdisk", "blkid", "guest-kernel", "qemu-system-x86_64", "qemu-img"),
    *("busybox", "cpio", "lvm"),
)

MIB = 1 << 20
#: bytes of the volume that stays, and of the one that is removed; where LVM's first extent is in its partition
KEPT, GONE, FIRST_EXTENT = 24 * MIB, 32 * MIB, MIB
#: where the partition begins
PARTITION = 3 * MIB

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin LVM_SYSTEM_DIR=/run
say() { echo "guest: $*"; }
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in MODULES; do insmod /$module; done
until [ -e /dev/vda1 ]; do :; done
cat >/run/lvm.conf <<END
activation { udev_sync=0 udev_rules=0 monitoring=0 }
backup { backup=0 archive=0 }
devices { obtain_device_list_from_udev=0 use_devicesfile=0 issue_discards=1 scan=["/dev"] }
global { event_activation=0 locking_dir="/run" use_lvmpolld=0 }
END
lvm pvcreate -qq /dev/vda1
lvm vgcreate -qq vg /dev/vda1
lvm lvcreate -qq -Zn -Wn -n keep -L KEPTb vg
lvm lvcreate -qq -Zn -Wn -n gone -L GONEb vg
for name in keep gone; do dd if=/dev/urandom of=/dev/vg/$name bs=1M 2>/dev/null; done
sync
say written yes
read -r line
lvm lvremove -qq -y vg/gone
say removed yes
read -r line
lvm vgchange -qq -an vg
lvm vgchange -qq -ay vg
say volumes $(lvm lvs --noheadings -o name vg)
say sum $(sha256sum </dev/vg/keep | cut -c 1-64)
lvm vgchange -qq -an vg
poweroff -f
"""


def test_logical_volumes(mount: Mounts, guests: Guests, tmp_path: Path) -> None:
    base, image = tmp_path / "base.raw", tmp_path / "vm.qcow2"
    ok(cowfs("create", "-q", base, "80M"))
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image))
    mounted = mount("-o", "flush-interval=0.2", image)
    flat = mounted.flat("vm")
    (tmp_path / "table").write_text(f"label: gpt\nstart={PARTITION // 512}, type=lvm\n")
    with loop_on(flat) as device:
        made = shell(f"sfdisk -q {device} <{tmp_path}/table")
        assert made.returncode == 0, made.stderr

    init = _INIT.replace("KEPT", str(KEPT)).replace("GONE", str(GONE))
    guest = guests(make_initramfs(tmp_path, init, ["dm-mod"], ["lvm"]), flat, "cache=none,discard=unmap")
    guest.says("written")
    ok(cowfs("stream", "-q", flat))
    ok(cowfs("snapshot", "-q", "-c", "later.qcow2", flat))
    assert allocated(image) > KEPT + GONE
    guest.go_on()
    guest.says("removed")
    ok(cowfs("commit", "-q", "--pivot", flat))
    wait_for("the space of the volume to be given back", lambda: allocated(image) < KEPT + 4 * MIB)
    guest.shut_down()
    assert guest.said("volumes") == ["keep"]

    first = PARTITION + FIRST_EXTENT
    kept = hashlib.sha256(flat.read_bytes()[first : first + KEPT]).hexdigest()
    assert guest.said("sum") == [kept]
    with loop_on(flat) as device:
        kind = shell(f"blkid -p -o value -s TYPE {device}p1")
        assert kind.stdout == "LVM2_member\n", kind
    mounted.umount()
    wait_for_end(mounted.process)
    checked = qemu_img("check", image)
    assert checked.returncode == 0, checked
    plain = tmp_path / "plain.raw"
    ok(qemu_img("convert", "-O", "raw", image, plain))
    assert hashlib.sha256(plain.read_bytes()[first : first + KEPT]).hexdigest() == kept

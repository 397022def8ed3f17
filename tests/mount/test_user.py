"""Mounts of users who are not root, by way of fusermount3."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import PATIENCE, Result, cowfs, ok, qemu_img, refusal
from mounting import Namespace, wait_for_end

pytestmark = pytest.mark.needs("root", "fuse", "fusermount3", "setpriv", "nsenter", "unshare", "qemu-img")

MIB = 1 << 20
USER, OTHER = 65534, 65533

#: /dev/fuse as every distribution has it, and a fuse.conf of our own, without this machine having them
_PREPARE = """
mkdir device && mount -t tmpfs none device
mknod -m 666 device/fuse c 10 229 && mount --bind device/fuse /dev/fuse
touch fuse.conf
[ -e /etc/fuse.conf ] || touch /etc/fuse.conf
mount --bind fuse.conf /etc/fuse.conf
"""


class User:
    """Somebody who is not root, in a mount namespace, and the directory that belongs to them."""

    def __init__(self, directory: Path, uid: int, namespace: Namespace) -> None:
        self.home = directory
        self._namespace = namespace
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        self.prefix = [*namespace.prefix, f"--wdns={directory}", *drop]

    def cowfs(self, *words: str | Path) -> Result:
        return cowfs(*words, prefix=self.prefix)

    def run(self, *words: str | Path) -> Result:
        command = [*self.prefix, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def other(self, uid: int) -> "User":
        return User(self.home, uid, self._namespace)

    def server(self) -> int:
        """The process behind the mount ``disks``, as a pidfd."""
        words = self.cowfs("status", "disks").stdout.split()
        return os.pidfd_open(int(words[words.index("server") + 1].rstrip(",")))


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """A user with an overlay ``vm.qcow2`` on a base of random bytes, and a directory ``disks`` to mount on."""
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == tmp_path.owner() and not path.stat().st_mode & 0o1:
            path.chmod(path.stat().st_mode | 0o711)
    with Namespace(tmp_path, _PREPARE) as namespace:
        home = tmp_path / "home"
        (home / "disks").mkdir(parents=True)
        (home / "base.raw").write_bytes(os.urandom(8 * MIB))
        for path in (home, home / "disks", home / "base.raw"):
            os.chown(path, USER, USER)
        made = User(home, USER, namespace)
        ok(made.cowfs("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "vm.qcow2"))
        yield made


def test_a_user_mounts_works_and_unmounts(user: User) -> None:
    assert ok(user.cowfs("mount", "vm.qcow2", "disks")) == ""
    listed = user.run("stat", "-c", "%u %g %a %s", "disks/vm")
    assert ok(listed) == f"{USER} {USER} 600 {8 * MIB}\n"
    assert user.run("cmp", "base.raw", "disks/vm").returncode == 0
    ok(user.run("dd", "if=/dev/zero", "of=disks/vm", "bs=1M", "seek=3", "count=1", "conv=notrunc,fsync", "status=none"))
    assert "vm: 8 MiB" in ok(user.cowfs("status", "disks"))
    ok(user.cowfs("snapshot", "-q", "-c", "later.qcow2", "disks/vm"))
    ok(user.cowfs("commit", "-q", "--pivot", "disks/vm"))
    ok(user.cowfs("stream", "-q", "disks/vm"))
    chain = ok(user.run("cat", "disks/.cowfs/vm/chain"))
    assert chain == f"0 qcow2 {8 * MIB} {user.home}/vm.qcow2\n"
    assert "Permission denied" in refusal(user.cowfs("attach", "disks/vm"))
    ok(user.cowfs("umount", "disks"))

    assert qemu_img("check", user.home / "vm.qcow2").returncode == 0
    ok(qemu_img("convert", "-O", "raw", user.home / "vm.qcow2", user.home / "plain"))
    expected = bytearray((user.home / "base.raw").read_bytes())
    expected[3 * MIB : 4 * MIB] = bytes(MIB)
    assert (user.home / "plain").read_bytes() == expected


@pytest.mark.parametrize("command", [("umount",), ("fusermount3", "-u")], ids=lambda command: command[0])
def test_other_ways_to_unmount_flush_and_end_the_server(user: User, command: tuple[str, ...]) -> None:
    ok(user.cowfs("mount", "vm.qcow2", "disks"))
    server = user.server()
    ok(user.run("dd", "if=/dev/zero", "of=disks/vm", "bs=1M", "seek=3", "count=1", "conv=notrunc", "status=none"))
    ok(user.run(*command, "disks"))
    try:
        wait_for_end(server)
    finally:
        os.close(server)
    assert qemu_img("check", user.home / "vm.qcow2").returncode == 0
    ok(qemu_img("convert", "-O", "raw", user.home / "vm.qcow2", user.home / "plain"))
    assert (user.home / "plain").read_bytes()[3 * MIB : 4 * MIB] == bytes(MIB)


def test_others_are_let_in_where_the_administrator_allows_it(user: User) -> None:
    said = refusal(user.cowfs("mount", "-o", "allow_other", "vm.qcow2", "disks"))
    assert "option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf" in said
    assert user.run("mountpoint", "-q", "disks").returncode != 0

    other = user.other(OTHER)
    ok(user.cowfs("mount", "-o", "mode=644", "vm.qcow2", "disks"))
    assert "Permission denied" in other.run("cat", "disks/vm").stderr
    ok(user.cowfs("umount", "disks"))

    (user.home.parent / "fuse.conf").write_text("user_allow_other\n")
    ok(user.cowfs("mount", "-o", "allow_other,mode=644", "vm.qcow2", "disks"))
    assert other.run("cmp", "base.raw", "disks/vm").returncode == 0
    assert "Permission denied" in other.run("sh", "-c", "echo start >disks/.cowfs/vm/stream").stderr
    ok(user.cowfs("umount", "disks"))


def test_a_user_gets_no_more_than_a_user_may(user: User) -> None:
    ok(user.cowfs("mount", "-o", "dev,suid", "vm.qcow2", "disks"))
    options = ok(user.run("findmnt", "-n", "-o", "OPTIONS", "disks"))
    assert {"nodev", "nosuid"} <= set(options.strip().split(","))
    ok(user.cowfs("umount", "disks"))
    assert "no write access to mountpoint" in refusal(user.cowfs("mount", "vm.qcow2", "/mnt"))
    ok(user.run("chmod", "400", "vm.qcow2"))
    assert "-o ro" in refusal(user.cowfs("mount", "vm.qcow2", "disks"))
    ok(user.cowfs("mount", "-o", "ro", "vm.qcow2", "disks"))
    ok(user.cowfs("umount", "disks"))

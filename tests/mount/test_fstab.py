"""Mounts by way of mount(8): fstab, its helpers, the unit of the manual, and umount(8)."""

import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import automount
import pytest
from commandline import PATIENCE, Result, cowfs, ok, qemu_img
from mounting import Namespace, wait_for_end

from cowfs.cli.mounthelper import main as mount_helper

pytestmark = pytest.mark.needs("root", "fuse", "nsenter", "unshare", "mount.fuse3", "qemu-img")

MIB = 1 << 20
_ROOT = Path(__file__).parent.parent.parent

#: mount(8) looks for its own helper in /sbin; what mount.fuse3 runs is found in a PATH that mount(8) sets
_PREPARE = """
mkdir real sbin && mount --bind /usr/sbin real
ln -s "$PWD"/real/* sbin/ && ln -sf "$PWD"/bin/mount.cowfs sbin/mount.cowfs
mount --bind sbin /usr/sbin
mount --bind bin /usr/local/sbin
"""


class Host:
    """A machine on which cowfs is installed as the manual says, with an overlay on a base of random bytes."""

    def __init__(self, directory: Path, namespace: Namespace) -> None:
        self.directory = directory
        self.image, self.point = directory / "vm.qcow2", directory / "disks"
        self._prefix = namespace.prefix

    def run(self, *words: str | Path) -> Result:
        command = [*self._prefix, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def options(self) -> set[str]:
        return set(ok(self.run("findmnt", "-n", "-o", "OPTIONS", self.point)).strip().split(","))

    def write(self, offset: int) -> Result:
        """One MiB of zeros, not flushed."""
        words = ("bs=1M", f"seek={offset // MIB}", "count=1", "conv=notrunc", "status=none")
        return self.run("dd", "if=/dev/zero", f"of={self.point}/vm", *words)

    def umount(self) -> None:
        """With umount(8), and wait for the server."""
        (line,) = (line for line in ok(self.cowfs("status", self.point)).splitlines() if "server " in line)
        server = os.pidfd_open(int(re.findall(r"server (\d+)", line)[0]))
        try:
            ok(self.run("umount", self.point))
            wait_for_end(server)
        finally:
            os.close(server)

    def cowfs(self, *words: str | Path) -> Result:
        return cowfs(*words, prefix=self._prefix)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    (tmp_path / "bin").mkdir()
    for line in setup["options.entry_points"]["console_scripts"].strip().splitlines():
        name, module, function = re.split(r" = |:", line)
        program = tmp_path / "bin" / name
        program.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        program.chmod(0o755)
    (tmp_path / "base.raw").write_bytes(os.urandom(8 * MIB))
    (tmp_path / "disks").mkdir()
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "vm.qcow2", cwd=tmp_path))
    with Namespace(tmp_path, _PREPARE) as namespace:
        yield Host(tmp_path, namespace)


@pytest.fixture(params=["cowfs", "fuse.cowfs"])
def fstype(request: pytest.FixtureRequest) -> str:
    """What stands behind ``mount -t``."""
    return str(request.param)


def test_mount_and_umount(host: Host, fstype: str) -> None:
    ok(host.run("mount", "-t", fstype, host.image, host.point))
    (kind,) = ok(host.run("findmnt", "-n", "-o", "FSTYPE", host.point)).split()
    assert kind == "fuse.cowfs"
    assert host.run("cmp", host.directory / "base.raw", host.point / "vm").returncode == 0
    ok(host.write(3 * MIB))
    host.umount()
    assert qemu_img("check", host.image).returncode == 0
    plain = host.directory / "plain"
    ok(qemu_img("convert", "-O", "raw", host.image, plain))
    expected = bytearray((host.directory / "base.raw").read_bytes())
    expected[3 * MIB : 4 * MIB] = bytes(MIB)
    assert plain.read_bytes() == expected


def test_a_line_of_fstab(host: Host, fstype: str) -> None:
    table = host.directory / "fstab"
    words = "noatime,nosuid,nodev,noauto,nofail,x-systemd.device-timeout=5,_netdev,mode=640,gid=6"
    table.write_text(f"{host.image} {host.point} {fstype} {words} 0 0\n")
    ok(host.run("mount", "-T", table, host.point))
    assert {"rw", "noatime", "nosuid", "nodev"} <= host.options()
    assert ok(host.run("stat", "-c", "%g %a", host.point / "vm")) == "6 640\n"
    host.umount()

    table.write_text(f"{host.image} {host.point} {fstype} ro,no-copy-on-read 0 0\n")
    before = host.image.read_bytes()
    ok(host.run("mount", "-a", "-T", table))
    assert "ro" in host.options()
    assert "Read-only file system" in host.write(0).stderr
    assert host.run("cmp", host.directory / "base.raw", host.point / "vm").returncode == 0
    # nothing is mounted twice
    ok(host.run("mount", "-a", "-T", table))
    assert len(ok(host.run("findmnt", "-n", host.point)).splitlines()) == 1
    host.umount()
    assert host.image.read_bytes() == before


def test_options_of_the_command(host: Host, fstype: str) -> None:
    ok(host.run("mount", "-r", "-t", fstype, "-o", "nodev,allow_other", host.image, host.point))
    assert {"ro", "nodev", "allow_other"} <= host.options()
    host.umount()
    refused = host.run("mount", "-t", fstype, "-o", "bogus", host.image, host.point)
    assert refused.stderr == "cowfs: unknown mount option 'bogus'\n"
    assert refused.returncode == (32 if fstype == "cowfs" else 1)
    refused = host.run("mount", "-t", fstype, host.directory / "none", host.point)
    assert "cannot open: No such file or directory" in refused.stderr
    assert refused.returncode
    assert host.run("mountpoint", "-q", host.point).returncode


@pytest.mark.needs("autofs")
def test_a_disk_is_mounted_when_it_is_first_looked_at(host: Host, fstype: str) -> None:
    """As with ``x-systemd.automount``: until it is mounted, nobody but the automounter gets to the directory."""
    command = ("mount", "-t", fstype, host.image, host.point)
    assert ok(host.run(sys.executable, automount.__file__, host.point, *command)) == "vm\n"
    ok(host.write(0))
    host.umount()
    assert qemu_img("check", host.image).returncode == 0


@pytest.mark.needs("systemd-analyze")
def test_the_unit_of_the_manual(host: Host) -> None:
    text = (_ROOT / "man" / "cowfs.1").read_text().replace("\\-", "-")
    unit = text[text.index("[Unit]\n") :]
    unit = unit[: unit.index(".fi\n")].replace("/images/vm1.qcow2", str(host.image))
    name = ok(host.run("systemd-escape", "--path", "--suffix=mount", host.point)).strip()
    file = host.directory / name
    file.write_text(unit.replace("/mnt/disks", str(host.point)))
    checked = host.run("systemd-analyze", "verify", "--man=no", file)
    assert name not in checked.stderr, checked
    assert checked.returncode == 0, checked

    said = dict(re.findall(r"^(What|Where|Type|Options)=(.+)$", file.read_text(), re.MULTILINE))
    ok(host.run("mount", said["What"], said["Where"], "-t", said["Type"], "-o", said["Options"]))
    ok(host.write(0))
    host.umount()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "usage"),
        (["only-one"], "usage"),
        (["a", "b", "c"], "usage"),
        (["a", "b", "-x"], "option -x not recognized"),
        (["a", "b", "-o"], "option -o requires argument"),
        (["a", "b", "-N", "/proc/1/ns/mnt"], "namespace"),
    ],
)
def test_wrong_usage_of_the_helper(capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert mount_helper(args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mount.cowfs: ")
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_the_helper_that_is_to_do_nothing_does_nothing(tmp_path: Path) -> None:
    assert mount_helper([str(tmp_path / "none"), str(tmp_path), "-f", "-o", "rw"]) == 0

"""A disk moves from one host to another while it is in use there, over a slow link that fails for a while.

The two hosts are network namespaces. The tools that share the disk and check it are QEMU's and e2fsprogs'.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import PATIENCE, cowfs, ok, qemu_img
from mounting import Mounts, shell, wait_for

pytestmark = pytest.mark.needs("root", "fuse", "loop", "ip", "tc", "nsenter", "qemu-nbd", "mkfs.ext4")

SIZE = 96 << 20
#: bytes of files on the disk; at the link's rate they take some seconds
FILES, FILE = 12, 2 << 20
PORT = 10809
SOURCE, DESTINATION = "10.231.77.1", "10.231.77.2"


def run(command: str) -> None:
    result = shell(command)
    assert result.returncode == 0, f"{command}: {result.stderr}"


class Hosts:
    """Two hosts and the link between them: 40 Mbit/s each way. Commands run on one behind its prefix."""

    def __init__(self) -> None:
        self._names = [f"cowfs-{os.getpid()}-{role}" for role in ("source", "target")]
        self.source, self.target = (["nsenter", f"--net=/run/netns/{name}"] for name in self._names)
        source, target = self._names
        run(f"ip netns add {source} && ip netns add {target}")
        run(f"ip -n {source} link add veth0 type veth peer name veth0 netns {target}")
        for name, address in ((source, SOURCE), (target, DESTINATION)):
            run(f"ip -n {name} addr add {address}/24 dev veth0 && ip -n {name} link set veth0 up")
            run(f"ip netns exec {name} tc qdisc add dev veth0 root tbf rate 40mbit burst 64kb latency 200ms")

    def cut(self) -> None:
        run(f"ip -n {self._names[0]} link set veth0 down")

    def mend(self) -> None:
        run(f"ip -n {self._names[0]} link set veth0 up")

    def clean_up(self) -> None:
        for name in self._names:
            shell(f"ip netns del {name}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        yield made
    finally:
        made.clean_up()


def make_disk(directory: Path) -> tuple[Path, dict[str, bytes]]:
    """A qcow2 image with ext4 in it, and its files."""
    raw, root = directory / "disk.raw", directory / "root"
    root.mkdir()
    content = {f"file{number}": random.Random(number).randbytes(FILE) for number in range(FILES)}
    run(f"truncate -s {SIZE} {raw} && mkfs.ext4 -q {raw} && mount -o loop {raw} {root}")
    try:
        for name, data in content.items():
            (root / name).write_bytes(data)
    finally:
        run(f"umount {root}")
    path = directory / "disk.qcow2"
    ok(qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path))
    return path, content


def test_a_disk_is_used_elsewhere_at_once_and_then_moves(tmp_path: Path, hosts: Hosts, mount: Mounts) -> None:
    disk, content = make_disk(tmp_path)
    url = f"nbd://{SOURCE}:{PORT}/disk"
    words = ["qemu-nbd", "-f", "qcow2", "-r", "-t", "-e", "8", "-b", SOURCE, "-p", str(PORT), "-x", "disk", str(disk)]
    top, root, log = tmp_path / "top.qcow2", tmp_path / "root", tmp_path / "log"
    with subprocess.Popen([*hosts.source, *words]) as server, ThreadPoolExecutor() as pool:
        wait_for("the server", lambda: shell(f"{' '.join(hosts.source)} ss -Hltn sport = :{PORT}").stdout != "")
        ok(cowfs("create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", top, prefix=hosts.target))
        mounted = mount("-o", f"net-timeout=2,net-retry=600,log={log}", top, prefix=hosts.target)
        flat = mounted.flat("top")
        device = ok(cowfs("attach", flat)).strip()
        try:
            run(f"mount {device} {root}")
            # at once: most of the disk is still on the other host
            assert (root / "file3").read_bytes() == content["file3"]
            content["new"] = os.urandom(1 << 20)
            (root / "new").write_bytes(content["new"])
            (root / "file5").unlink()
            del content["file5"]
            run(f"sync -f {root}")
            ok(cowfs("stream", "--no-wait", flat))
            wait_for("some progress", lambda: int(mounted.job("top", "stream")["offset"]) > 2 << 20)
            hosts.cut()
            wait_for("the loss", lambda: "connection is lost" in log.read_text())
            # what needs the other host waits, what is here does not
            waiting = pool.submit((root / "file11").read_bytes)
            assert (root / "new").read_bytes() == content["new"]
            (root / "meanwhile").write_bytes(content.setdefault("meanwhile", os.urandom(100_000)))
            before = mounted.job("top", "stream")
            assert before["state"] == "running"
            assert float(before["percent"]) < 90
            assert not waiting.done()
            hosts.mend()
            assert waiting.result(PATIENCE) == content["file11"]
            job = mounted.job_ended("top", "stream")
            assert (job["state"], job["error"]) == ("completed", "")
            assert "connected again" in log.read_text()
            # and now without the other host
            assert mounted.control("top", "chain").read_text().count("\n") == 1
            server.kill()
            hosts.cut()
            for name, data in content.items():
                assert (root / name).read_bytes() == data, name
        finally:
            server.kill()
            hosts.mend()
            shell(f"umount {root}")
            shell(f"losetup -d {device}")
        wait_for("the loop device to let go", lambda: not shell(f"losetup -j {flat}").stdout)
        whole = flat.read_bytes()
        mounted.umount()
    assert qemu_img("check", top).returncode == 0
    assert "backing file" not in ok(qemu_img("info", top))
    flattened = tmp_path / "flattened.raw"
    ok(qemu_img("convert", "-f", "qcow2", "-O", "raw", top, flattened))
    assert flattened.read_bytes() == whole
    run(f"e2fsck -fn {flattened}")
    run(f"mount -o loop,ro {flattened} {root}")
    try:
        assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == content
    finally:
        run(f"umount {root}")

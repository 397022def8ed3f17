"""Lazy reference counts: QEMU killed while they are not true, cowfs killed on the same image, and who goes on."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import qemu_img, qemu_io
from imagetools import assert_clean, disk_at, qemu_content, qemu_create
from powercut import RecordingStorage

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.formats import qcow2
from cowfs.formats.chain import open_disk

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 4 << 20
LAYOUTS: dict[str, dict[str, object]] = {
    "512": {"cluster_size": 512},
    "4k, 1 bit": {"cluster_size": 4096, "refcount_bits": 1},
    "64k": {},
    "64k, subclusters": {"extended_l2": "on"},
}

#: writes what standard input says, flushes, tells so, writes more that is never flushed, and waits to be killed
WRITER = """
import sys, trio
from cowfs.formats.chain import open_disk

async def main():
    disk = await open_disk(sys.argv[1], writable=True)
    for line in sys.stdin:
        offset, length, value = map(int, line.split())
        await disk.write(offset, bytes([value]) * length)
    await disk.flush()
    await disk.write(0, b"not flushed")
    await disk.write(disk.size // 2, b"not flushed" * 10_000)
    print("written", flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


class Victim:
    """An image that allows lazy reference counts, and what has been flushed to it."""

    def __init__(self, path: Path, layout: str) -> None:
        self.path = path
        self.rnd = random.Random(7)
        qemu_create(path, SIZE, lazy_refcounts="on", **LAYOUTS[layout])
        self.model = bytearray(SIZE)

    @property
    def is_dirty(self) -> bool:
        return bool(self.path.read_bytes()[79] & 1)

    def _writes(self) -> list[tuple[int, int, int]]:
        found = []
        for _ in range(8):
            # the first sectors, and what follows the middle, are left to what is never flushed
            offset = self.rnd.randrange(1, SIZE // 2 // 512) * 512
            length = min(self.rnd.choice([512, 4096, 65_536, 200_704]), SIZE // 2 - offset)
            found.append((offset, length, self.rnd.randrange(1, 256)))
            self.model[offset : offset + length] = bytes([found[-1][2]]) * length
        return found

    def kill_qemu(self) -> None:
        """QEMU writes, flushes, writes, and is killed."""
        commands = [f"write -P {value} {offset} {length}" for offset, length, value in self._writes()]
        words = [*commands, "flush", "write -P 99 3M 100k", "write -z 0 512", "sigraise 9"]
        options = [word for command in words for word in ("-c", command)]
        done = subprocess.run(["qemu-io", "-f", "qcow2", *options, self.path], capture_output=True, check=False)
        assert done.returncode == -9, done.stderr
        assert self.is_dirty

    def kill_cowfs(self) -> None:
        """So does cowfs, in a process of its own."""
        lines = "".join(f"{offset} {length} {value}\n" for offset, length, value in self._writes())
        command = [sys.executable, "-c", WRITER, str(self.path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(lines)
            process.stdin.close()
            try:
                assert process.stdout.readline() == "written\n"
            finally:
                process.kill()

    def _kept(self, content: bytes | bytearray) -> bytes:
        return bytes(content[512 : SIZE // 2])

    async def verify(self) -> None:
        """Whoever reads finds what was flushed, and changes nothing."""
        before = self.path.read_bytes()
        disk = await open_disk(str(self.path))
        assert self._kept(await disk.read(0, SIZE)) == self._kept(self.model)
        await disk.close()
        assert self._kept(qemu_content(self.path)) == self._kept(self.model)
        assert self.path.read_bytes() == before


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_qemu_is_killed_and_cowfs_goes_on(tmp_path: Path, layout: str) -> None:
    victim = Victim(tmp_path / "image", layout)
    for _ in range(2):
        victim.kill_qemu()
        await victim.verify()
        async with disk_at(victim.path) as disk:
            assert not victim.is_dirty, "what is open for writing has been repaired"
            await disk.write(SIZE - 100, b"goes on")
        assert_clean(victim.path)
        await victim.verify()


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_cowfs_is_killed_and_qemu_goes_on(tmp_path: Path, layout: str) -> None:
    victim = Victim(tmp_path / "image", layout)
    for _ in range(2):
        victim.kill_cowfs()
        assert not victim.is_dirty, "counts are true, or too high"
        assert qemu_img("check", victim.path).returncode in (0, 3), "leaks at most"
        await victim.verify()
        qemu_io(victim.path, "qcow2", f"write -P 5 {SIZE - 512} 512")
        assert qemu_img("check", "-r", "leaks", victim.path).returncode == 0
        assert_clean(victim.path)
        await victim.verify()


async def test_both_are_killed_in_turns_with_nobody_repairing_in_between(tmp_path: Path) -> None:
    victim = Victim(tmp_path / "image", "512")
    for kill in (victim.kill_qemu, victim.kill_cowfs, victim.kill_qemu, victim.kill_qemu, victim.kill_cowfs):
        kill()
        await victim.verify()
    victim.kill_qemu()
    # QEMU repairs by itself what is dirty, as it opens it
    qemu_io(victim.path, "qcow2", f"write -P 5 {SIZE - 512} 512")
    assert not victim.is_dirty
    await victim.verify()
    assert qemu_img("check", "-r", "all", victim.path).returncode == 0
    assert_clean(victim.path)
    await victim.verify()


@pytest.mark.parametrize("layout", ["512", "64k"])
async def test_cowfs_is_cut_off_while_it_repairs(tmp_path: Path, layout: str) -> None:
    victim = Victim(tmp_path / "image", layout)
    victim.kill_qemu()
    storage = RecordingStorage("image", victim.path.read_bytes())
    disk = Disk([Layer(await qcow2.open_image(storage))], copy_on_read=False)
    await disk.write(SIZE - 100, b"goes on")
    await disk.close()
    cuts = list(storage.cuts(victim.rnd, 2))
    assert any(content[79] & 1 for content in cuts)
    for content in victim.rnd.sample(cuts, min(len(cuts), 12)):
        victim.path.write_bytes(content)
        # still dirty, or with counts that are true or too high
        assert victim.is_dirty or qemu_img("check", victim.path).returncode in (0, 3)
        await victim.verify()
        qemu_io(victim.path, "qcow2", f"write -P 5 {SIZE - 512} 512")
        assert qemu_img("check", "-r", "leaks", victim.path).returncode == 0
        assert_clean(victim.path)
        await victim.verify()

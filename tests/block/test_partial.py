"""Clusters of which only a part has been written: what is read, flushed, copied and lost of them."""

import random
from pathlib import Path

import pytest
import trio
from commandline import ok, qemu_img

from cowfs.block import partial
from cowfs.block.disk import Disk
from cowfs.formats.chain import open_disk

KIB = 1024


class Guest:
    """Writes and reads a disk as the file system does, and knows what should be there."""

    def __init__(self, disk: Disk, model: bytearray, chooser: random.Random) -> None:
        self.disk = disk
        self.model = model
        self.chooser = chooser

    async def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)

    async def check(self, offset: int, length: int) -> None:
        buffer = bytearray(length)
        if not self.disk.readinto_now(offset, memoryview(buffer)):
            await self.disk.readinto(offset, memoryview(buffer))
        assert buffer == self.model[offset : offset + length], (offset, length)

    def range(self) -> tuple[int, int]:
        unit = self.chooser.choice([1, 512, 4096, 4096])
        most = self.chooser.choice([1, 4, 40])
        length = min(unit * self.chooser.randint(1, most), self.disk.size)
        offset = self.chooser.randrange(0, self.disk.size - length + 1)
        return offset - offset % unit, length

    async def step(self) -> None:
        offset, length = self.range()
        match self.chooser.choices(["write", "read", "flush", "copy up", "grow", "again"], [60, 25, 3, 5, 1, 4])[0]:
            case "write":
                await self.write(offset, self.chooser.randbytes(length))
            case "read":
                await self.check(offset, length)
            case "flush":
                await self.disk.flush()
            case "copy up":
                await self.disk.copy_up(offset, length)
            case "grow":
                size = self.disk.size + self.chooser.randint(1, 9) * 8 * KIB
                await self.disk.grow(size)
                self.model.extend(bytes(size - len(self.model)))
            case "again":
                await self.write(offset, bytes(self.model[offset : offset + length]))


OVERLAYS = [
    ("qcow2", "cluster_size=4k"),
    ("qcow2", "cluster_size=64k"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "compat=0.10"),
    ("qcow2", "extended_l2=on"),
    ("qed", "cluster_size=4k,table_size=2"),
    ("qed", "cluster_size=64k"),
]


@pytest.mark.parametrize(("format", "options"), OVERLAYS, ids=lambda value: str(value).replace("cluster_size=", ""))
@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_writes_is_what_is_read(tmp_path: Path, format: str, options: str, seed: int) -> None:
    chooser = random.Random(seed)
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle.qcow2", f"top.{format}"))
    size = chooser.choice([300, 1000]) * KIB
    content = bytearray(chooser.randbytes(size * 3 // 4) + bytes(size // 8) + chooser.randbytes(size // 8))
    base.write_bytes(content)
    below = base
    if chooser.random() < 0.5:
        below = middle
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle))
    words: list[str | Path] = ["-b", below, "-F", "raw" if below == base else "qcow2"]
    ok(qemu_img("create", "-q", "-f", format, "-o", options, *words, top, str(size + chooser.choice([0, 64 * KIB]))))
    model = content.ljust(size, b"\0")
    for _ in range(3):
        disk = await open_disk(str(top), format, writable=True, flush_interval=1e9)
        model.extend(bytes(disk.size - len(model)))
        async with trio.open_nursery() as nursery:
            await nursery.start(disk.run)
            guest = Guest(disk, model, chooser)
            for _ in range(150):
                await guest.step()
            await guest.check(0, disk.size)
            assert await disk.read(0, disk.size) == model
            nursery.cancel_scope.cancel()
        await disk.close()
        ok(qemu_img("check", "-q", "-f", format, top))
        ok(qemu_img("convert", "-f", format, "-O", "raw", top, tmp_path / "flat"))
        assert (tmp_path / "flat").read_bytes() == model


@pytest.mark.parametrize(("format", "options"), [*OVERLAYS[:2], *OVERLAYS[-2:]])
async def test_guests_side_by_side_disturb_no_other(
    tmp_path: Path, format: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has every fourth 4 KiB of the disk; few clusters may be partial, and flushes come all the time."""
    monkeypatch.setattr(partial, "BOUND", 1 << 20)
    monkeypatch.setattr(partial, "BATCH", 4)
    model = bytearray(random.Random(1).randbytes(2 << 20))
    base, top = tmp_path / "base.raw", tmp_path / f"top.{format}"
    base.write_bytes(model)
    ok(qemu_img("create", "-q", "-f", format, "-o", options, "-b", base, "-F", "raw", top))
    disk = await open_disk(str(top), format, writable=True, flush_interval=1e9)

    async def live(number: int) -> None:
        chooser = random.Random(number)
        guest = Guest(disk, model, chooser)
        for _ in range(400):
            block = (chooser.randrange(len(model) // 4096 // 4) * 4 + number) * 4096
            length = chooser.choice([512, 1024, 4096])
            await guest.write(block + chooser.randrange(0, 4096 - length + 1, 512), chooser.randbytes(length))
            await guest.check(block, 4096)
            if chooser.random() < 0.3:
                await trio.lowlevel.checkpoint()
            if chooser.random() < 0.02:
                await disk.flush()

    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        async with trio.open_nursery() as guests:
            for number in range(4):
                guests.start_soon(live, number)
        nursery.cancel_scope.cancel()
    await disk.close()
    ok(qemu_img("check", "-q", "-f", format, top))
    ok(qemu_img("convert", "-f", format, "-O", "raw", top, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == model

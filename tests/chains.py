"""Chains of several layers, made and judged by QEMU, for tests of jobs that rearrange them."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from commandline import ok, qemu_img, qemu_io
from imagetools import commands

from cowfs.block.disk import Disk
from cowfs.formats.chain import open_disk
from cowfs.jobs.job import Job, State

K, M = 1 << 10, 1 << 20
SIZE = 6 * M

#: format, options and bytes of the disk of each layer, deepest first
Plan = Sequence[tuple[str, dict[str, object], int]]

PLAIN: Plan = [("raw", {}, SIZE), *[("qcow2", {}, SIZE)] * 3]
MIXED: Plan = [
    ("qcow2", {"cluster_size": "2M"}, SIZE),
    ("qed", {}, SIZE),
    ("qcow2", {"cluster_size": 4096}, SIZE),
    ("qcow2", {"extended_l2": "on", "cluster_size": "128k"}, SIZE),
]
OLD: Plan = [("qed", {"cluster_size": 4096}, SIZE), ("qcow2", {"compat": "0.10"}, SIZE), ("qed", {}, SIZE)]
GROWING: Plan = [
    ("qcow2", {}, 2 * M),
    ("qcow2", {}, 3 * M + 512),
    ("qcow2", {"cluster_size": 16 * K}, 5 * M + 3 * 512),
    ("qcow2", {}, SIZE),
]
SHRINKING: Plan = [("raw", {}, SIZE), ("qcow2", {}, 3 * M + 512), ("qcow2", {}, 2 * M), ("qcow2", {}, 5 * M)]
PLANS = {"plain": PLAIN, "mixed": MIXED, "old": OLD, "growing": GROWING, "shrinking": SHRINKING}


def view(path: Path, format: str) -> bytes:
    """The disk as QEMU sees it."""
    flat = path.with_suffix(".flat")
    ok(qemu_img("convert", "-f", format, "-O", "raw", path, flat))
    content = flat.read_bytes()
    flat.unlink()
    return content


class ChainFiles:
    """The files of a chain, deepest first, and what the disk is as of each."""

    def __init__(self, folder: Path, plan: Plan, seed: int = 0) -> None:
        rnd = random.Random(seed)
        self.paths: list[Path] = []
        self.formats: list[str] = []
        for number, (format, options, size) in enumerate(plan):
            path = folder / f"layer{number}.{format}"
            words = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
            if number:
                words += ["-b", self.paths[-1].name, "-F", self.formats[-1]]
            ok(qemu_img("create", "-q", "-f", format, *words, path, str(size)))
            qemu_io(path, format, *commands(rnd, size, 14, zeroes=format == "qcow2"))
            self.paths.append(path)
            self.formats.append(format)
        self.views = [view(path, format) for path, format in zip(self.paths, self.formats, strict=True)]

    @property
    def top(self) -> Path:
        return self.paths[-1]

    @asynccontextmanager
    async def opened(self, *, copy_on_read: bool = False) -> AsyncIterator[Disk]:
        """The chain as a disk in use, with all that goes on behind it."""
        disk = await open_disk(str(self.top), self.formats[-1], writable=True, copy_on_read=copy_on_read)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(disk.run)
                yield disk
                nursery.cancel_scope.cancel()
        finally:
            await disk.close()

    def check(self, *numbers: int) -> None:
        """``qemu-img check`` of the layers with these numbers, 0 the deepest."""
        for number in numbers:
            if self.formats[number] != "raw":
                ok(qemu_img("check", "-q", "-f", self.formats[number], self.paths[number]))


class Writer:
    """A guest that writes to random places, or discards them, as fast as it gets answers, and knows what it wrote."""

    def __init__(self, disk: Disk, content: bytes, seed: int = 1) -> None:
        self.disk = disk
        self.model = bytearray(content)
        self.writes = 0
        self._rnd = random.Random(seed)

    async def write(self) -> None:
        rnd = self._rnd
        size = rnd.choice([512, 4096, 4096, 4096, 70_000])
        offset = rnd.randrange((len(self.model) - size) // 512) * 512
        discards = rnd.random() < 0.1
        data = bytes(size) if discards else rnd.randbytes(size)
        self.model[offset : offset + size] = data
        with trio.CancelScope(shield=True):
            if discards:
                await self.disk.discard(offset, size)
            elif not self.disk.write_now(offset, data):
                await self.disk.write(offset, data)
            self.writes += 1
            if not self.writes % 50:
                await self.disk.flush()

    async def read(self) -> None:
        size = self._rnd.choice([512, 65_536])
        offset = self._rnd.randrange(len(self.model) - size)
        assert await self.disk.read(offset, size) == self.model[offset : offset + size]

    async def run(self) -> None:
        """Write and read until cancelled."""
        while True:
            await self.write()
            await self.read()
            await trio.lowlevel.checkpoint()


async def completed(job: Job) -> None:
    await job.run()
    assert (job.state, job.error) == (State.COMPLETED, "")

"""QED, written by QEMU and by cowfs in turn: one file, one content, and QEMU's check in between.

The cases cover every size of a cluster that QEMU can make in a test, every size of a table, and every kind of backing
file; not every combination. QEMU 7.2 is spared three of its own errors. It counts leaks that are none once tables of
4 KiB clusters map 16 MiB of data, so images stay small. It makes no images with clusters of 8 MiB and up. And where it
writes a part of a zero cluster, it fills the rest from the backing file instead of with zeros, so it is given whole
clusters there.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img
from qedtools import (
    M,
    assert_clean,
    assert_same_counts,
    drop,
    header_on_disk,
    opened,
    pattern,
    qemu_content,
    qemu_io,
)

from cowfs.block.disk import Disk

K = 1 << 10


@dataclass(frozen=True)
class Case:
    """An image: bytes of a cluster, clusters of a table, bytes of the disk, what is below it and how long that is."""

    cluster: int
    table: int
    size: int
    backing: str | None = None
    below: int = 0

    def __str__(self) -> str:
        return f"{self.cluster // K}k-{self.table}-{self.size}-{self.backing}-{self.below}"


CASES = [
    Case(4 * K, 2, 3 * M + 512),
    Case(4 * K, 2, 6 * M, "raw", 6 * M),
    Case(4 * K, 4, 5 * M + 1536, "raw", M + 700),
    Case(4 * K, 16, 2 * M, "qed", 4 * M),
    Case(4 * K, 8, 4 * M - 512, "qcow2", 4 * M - 512),
    Case(8 * K, 2, 7 * M + 512, "qed", M + 512),
    Case(16 * K, 4, 5 * M, "raw", 9 * M),
    Case(32 * K, 8, 6 * M + 12_800),
    Case(64 * K, 4, 4 * M, "qcow2", M),
    Case(64 * K, 2, 8 * M + 512, "raw", 512),
    Case(64 * K, 16, 3 * M + 65_024, "qed", 8 * M),
    Case(256 * K, 4, 6 * M + 512, "raw", 2 * M + 100),
    Case(512 * K, 2, 6 * M, "qcow2", 8 * M),
    Case(M, 4, 7 * M + 512),
    Case(2 * M, 2, 9 * M + 512, "raw", 3 * M + 512),
    Case(4 * M, 2, 17 * M + 512, "qed", 3 * M),
    Case(4 * K, 2, 512, "raw", 512),
]


class Image:
    """The image of a case in a directory of its own, and the bytes that it should have."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder = folder
        self.path = folder / "disk.qed"
        self.case = case
        self.chooser = random.Random(str(case))
        content = pattern(case.below, 1)
        self.model = bytearray(content[: case.size].ljust(case.size, b"\0"))
        self.below = bytes(self.model)
        #: numbers of clusters that may be zero clusters
        self.zeros: set[int] = set()
        words = []
        if case.backing is not None:
            (folder / "plain").write_bytes(content)
            base = folder / "base"
            if case.backing == "raw":
                (folder / "plain").rename(base)
            else:
                ok(qemu_img("convert", "-f", "raw", "-O", case.backing, folder / "plain", base))
            words = ["-b", "base", "-F", case.backing]
        options = f"cluster_size={case.cluster},table_size={case.table}"
        command = ("create", "-q", "-f", "qed", "-o", options, *words, str(self.path), str(case.size))
        ok(qemu_img(*command) if self.chooser.random() < 0.5 else cowfs(*command))

    def somewhere(self, align: int, limit: int | None = None) -> tuple[int, int]:
        """Offset, and a length that the disk has there; both aligned, but for the end of the disk."""
        size = len(self.model) if limit is None else limit
        offset = self.chooser.randrange(-(-size // align)) * align
        length = self.chooser.choice([1, 1, 2, 5, 40]) * align * self.chooser.choice([1, 1, 8])
        return offset, min(length, size - offset, max(3 * M // align, 1) * align)

    def write_with_qemu(self, count: int) -> None:
        """Writes and writes of zeros, that may or may not be given back, by the sector or by the byte."""
        words = []
        for _ in range(count):
            offset, length = self.somewhere(self.chooser.choice([1, 512, self.case.cluster]))
            offset, length = self._spare_zero_clusters(offset, length)
            byte = self.chooser.choice([0, self.chooser.randrange(1, 256), self.chooser.randrange(1, 256)])
            how = f"-P {byte}" if byte else self.chooser.choice(["-z", "-z -u"])
            words.append(f"write {how} {offset} {length}")
            self.set(offset, bytes([byte]) * length, zero=not byte)
        qemu_io(self.path, *words)

    def _spare_zero_clusters(self, offset: int, length: int) -> tuple[int, int]:
        cluster, end = self.case.cluster, offset + length
        if offset // cluster in self.zeros:
            offset = offset // cluster * cluster
        if (end - 1) // cluster in self.zeros:
            end = min(-(-end // cluster) * cluster, len(self.model))
        return offset, end - offset

    def set(self, offset: int, data: bytes, *, zero: bool = False) -> None:
        """Note what was written, or zeroed."""
        self.model[offset : offset + len(data)] = data
        cluster, end = self.case.cluster, offset + len(data)
        self.zeros -= {*range(offset // cluster, -(-end // cluster))}
        if zero:
            last = -(-end // cluster) if end == len(self.model) else end // cluster
            self.zeros |= {*range(-(-offset // cluster), last)}

    async def write_with_cowfs(self, count: int) -> None:
        async with opened(self.path) as disk:
            for _ in range(count):
                await self._change(disk)
                offset, length = self.somewhere(1)
                assert await disk.read(offset, length) == self.model[offset : offset + length]
            assert await disk.read(0, disk.size) == self.model

    async def _change(self, disk: Disk) -> None:
        kind = self.chooser.randrange(10)
        if kind < 6:
            offset, length = self.somewhere(self.chooser.choice([1, 512, self.case.cluster]))
            data = pattern(length, offset)
            if not disk.write_now(offset, data):
                await disk.write(offset, data)
            self.set(offset, data)
        elif kind < 9:
            offset, length = self.somewhere(1)
            await disk.zero_layer(0, offset, length)
            self.set(offset, bytes(length), zero=True)
        elif whole := len(self.below) // self.case.cluster * self.case.cluster:
            # only where the disk was from the first: what growing hides must not come to light
            offset, length = self.somewhere(self.case.cluster, whole)
            length = await drop(disk, offset, length)
            self.set(offset, self.below[offset : offset + length])

    async def grow(self, by: int, *, with_qemu: bool) -> None:
        size = len(self.model) + by
        self.zeros |= {*range(len(self.model) // self.case.cluster, size // self.case.cluster + 1)}
        tool = qemu_img if with_qemu else cowfs
        ok(tool("resize", "-q", "-f", "qed", self.path, str(size)))
        self.model.extend(bytes(by))
        assert header_on_disk(self.path).size == size

    async def judge(self) -> None:
        assert_clean(self.path)
        await assert_same_counts(self.path)
        assert qemu_content(self.path) == self.model


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_in_turn(tmp_path: Path, case: Case) -> None:
    image = Image(tmp_path, case)
    image.write_with_qemu(8)
    await image.write_with_cowfs(8)
    await image.judge()
    await image.grow(512 * 3, with_qemu=case.below <= case.size)
    image.write_with_qemu(8)
    await image.grow(M + 512, with_qemu=False)
    await image.write_with_cowfs(8)
    image.write_with_qemu(4)
    await image.judge()
    async with opened(image.path, writable=False) as disk:
        assert await disk.read(0, disk.size) == image.model

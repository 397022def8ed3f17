"""Any sequence of operations on a qcow2 image, against arrays of bytes: content, reference counts, QEMU's verdict.

Images with the smallest clusters and the narrowest counts, so that tables fill, move and come to an end all the time.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import trio
from commandline import ok, qemu_img
from hypothesis import HealthCheck, Phase, given, settings
from imagetools import DATE

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.formats.chain import open_disk
from cowfs.formats.create import create_image

pytestmark = pytest.mark.needs("qemu-img")

#: bytes; an L2 table of 512-byte clusters maps 32 KiB. Larger clusters are cut off by the end of the disk
SIZE = 150 * 1024 + 512
LARGEST = 256 * 1024
#: what lies below: of all bytes other than 0, and longer than most sizes that the disk comes to have
BELOW = bytes(range(1, 252)) * 900
EXAMPLES = int(os.environ.get("COWFS_EXAMPLES", "40"))

IMAGES: dict[str, tuple[dict[str, str], bool]] = {
    "512, 1 bit": ({"cluster_size": "512", "refcount_bits": "1"}, False),
    "512, 1 bit, over something": ({"cluster_size": "512", "refcount_bits": "1"}, True),
    "512, 64 bits": ({"cluster_size": "512", "refcount_bits": "64"}, False),
    "512, 64 bits, over something": ({"cluster_size": "512", "refcount_bits": "64"}, True),
    "1k, 2 bits": ({"cluster_size": "1k", "refcount_bits": "2"}, False),
    "512, version 2": ({"cluster_size": "512", "compat": "0.10"}, False),
    "1k, data file": ({"cluster_size": "1k", "data_file": "data"}, True),
    "16k, subclusters": ({"cluster_size": "16k", "extended_l2": "on"}, True),
    "16k, subclusters, 4 bits": ({"cluster_size": "16k", "extended_l2": "on", "refcount_bits": "4"}, False),
}

places = st.integers(0, LARGEST - 1)
lengths = st.one_of(st.integers(1, 600), st.sampled_from([512, 1024, 4096, 32_768, 70_000]))
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), places, lengths, st.integers(1, 255)),
    st.tuples(st.just("write"), places, lengths, st.integers(1, 255)),
    st.tuples(st.just("zero"), places, lengths),
    st.tuples(st.just("discard"), places, lengths),
    st.tuples(st.just("copy up"), places, lengths),
    st.tuples(st.just("read"), places, lengths),
    st.tuples(st.just("pack"), places),
    st.tuples(st.just("resize"), st.integers(1, LARGEST // 512)),
    st.tuples(st.sampled_from(["create", "create", "apply", "delete"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["flush", "settle", "compact", "reopen", "drop backing"])),
)


class Run:
    """One image, and what it ought to hold."""

    def __init__(self, path: Path, options: Mapping[str, str], *, backed: bool) -> None:
        self.path = path
        self.options = options
        self.below = BELOW if backed else b""
        self.model = bytearray(self.below[:SIZE].ljust(SIZE, b"\0"))
        self.snapshots: dict[str, bytes] = {}
        self.made = 0
        self.disk: Disk
        bits = int(options.get("refcount_bits", "16"))
        external = "data_file" in options
        self.most_snapshots = 0 if bits == 1 or external else 2 if bits == 2 else 3
        # what is packed shares host clusters, which narrow counts and snapshots do not agree with
        self.packs = not external and (bits >= 16 or bits == 1)
        self.shrinks = not external

    async def run(self, operations: list[tuple[Any, ...]]) -> None:
        if self.below:
            self.path.with_name("base").write_bytes(self.below)
        backing = Backing("base", "raw") if self.below else None
        await create_image(str(self.path), "qcow2", SIZE, backing, self.options)
        await self.open()
        for name, *values in operations:
            await getattr(self, name.replace(" ", "_"))(*values)
        await self.verify()

    async def open(self) -> None:
        self.disk = await open_disk(str(self.path), writable=True, copy_on_read=False)

    async def verify(self) -> None:
        assert await self.disk.read(0, self.disk.size) == self.model
        await self.disk.close()
        for name, content in self.snapshots.items():
            shown = await open_disk(str(self.path), snapshot=name)
            assert await shown.read(0, shown.size) == content, name
            await shown.close()
        disk = await open_disk(str(self.path))
        assert await disk.read(0, disk.size) == self.model
        found = await disk.layers[0].image.check()
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        await disk.close()
        ok(qemu_img("check", "-q", "-f", "qcow2", "top", cwd=self.path.parent))
        ok(qemu_img("convert", "-q", "-f", "qcow2", "-O", "raw", "top", "flat", cwd=self.path.parent))
        assert self.path.with_name("flat").read_bytes() == self.model

    def _area(self, place: int, length: int, unit: int = 1) -> tuple[int, int]:
        """Fit a place and length into the disk; whole units, but for the end of the disk."""
        start = place % len(self.model) // unit * unit
        return start, min(-(-length // unit) * unit, len(self.model) - start)

    def _put(self, start: int, data: bytes) -> None:
        self.model[start : start + len(data)] = data

    # -- operations

    async def write(self, place: int, length: int, value: int) -> None:
        start, length = self._area(place, length)
        data = bytes([value, value ^ 0x55]) * (length // 2) + bytes([value]) * (length % 2)
        if not self.disk.write_now(start, data):
            await self.disk.write(start, data)
        self._put(start, data)

    async def zero(self, place: int, length: int) -> None:
        start, length = self._area(place, length)
        await self.disk.zero_layer(0, start, length)
        self._put(start, bytes(length))

    async def discard(self, place: int, length: int) -> None:
        unit = self.disk.cluster_size
        start, length = self._area(place, length, unit)
        await self.disk.layers[0].deallocate(start, -(-length // unit) * unit)
        self._put(start, self.below[start : start + length].ljust(length, b"\0"))

    async def copy_up(self, place: int, length: int) -> None:
        await self.disk.copy_up(*self._area(place, length))

    async def read(self, place: int, length: int) -> None:
        start, length = self._area(place, length)
        found = bytearray(length)
        if not self.disk.readinto_now(start, memoryview(found)):
            await self.disk.readinto(start, memoryview(found))
        assert found == self.model[start : start + length]

    async def pack(self, place: int) -> None:
        if self.packs:
            unit = self.disk.cluster_size
            start, length = self._area(place, unit, unit)
            data = bytes([place % 251 + 1]) * unit
            packed = self.disk.layers[0].image.pack(data)
            assert packed is not None
            await self.disk.layers[0].write_packed(start, packed)
            self._put(start, data[:length])

    async def resize(self, sectors: int) -> None:
        size = sectors * 512
        if (self.options.get("compat") == "0.10" and self.snapshots) or (size < len(self.model) and not self.shrinks):
            return
        await (self.disk.shrink if size < len(self.model) else self.disk.grow)(size)
        self.model = bytearray(self.model[:size].ljust(size, b"\0"))

    async def create(self, _: int) -> None:
        if len(self.snapshots) < self.most_snapshots:
            self.made += 1
            name = f"number {self.made}"
            await self.disk.flush()
            await self.disk.layers[0].image.create_snapshot(name, DATE)
            self.snapshots[name] = bytes(self.model)

    async def apply(self, which: int) -> None:
        if self.snapshots:
            name = list(self.snapshots)[which % len(self.snapshots)]
            await self.disk.layers[0].image.apply_snapshot(name)
            self.model = bytearray(self.snapshots[name])

    async def delete(self, which: int) -> None:
        if self.snapshots:
            name = list(self.snapshots)[which % len(self.snapshots)]
            await self.disk.layers[0].image.delete_snapshot(name)
            del self.snapshots[name]

    async def flush(self) -> None:
        await self.disk.flush()

    async def settle(self) -> None:
        await self.disk.layers[0].image.settle()

    async def compact(self) -> None:
        await self.disk.compact()

    async def reopen(self) -> None:
        await self.disk.close()
        await self.open()

    async def drop_backing(self) -> None:
        """As a stream does at its end; snapshots would still take something from below."""
        if self.below and not self.snapshots:
            await self.disk.copy_up(0, self.disk.size)
            await self.disk.drop_backing()
            self.below = b""


@pytest.mark.parametrize("image", IMAGES)
def test_whatever_is_done(image: str) -> None:
    options, backed = IMAGES[image]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="COWFS_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(operations=st.lists(OPERATIONS, min_size=4, max_size=40))
    def attempt(operations: list[tuple[Any, ...]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trio.run(Run(Path(folder) / "top", options, backed=backed).run, operations)

    attempt()

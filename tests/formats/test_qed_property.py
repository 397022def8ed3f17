"""QED under random sequences of operations, beside an array of bytes.

After each operation a reader that knows nothing of cowfs looks at the file as it is on disk; QEMU does after each
session. Sequences that fail are cut down to what it takes.
"""

from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qedspec import NEED_CHECK, Read
from qedtools import assert_clean, crash, drop, make, pattern, qemu_content

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.formats.chain import open_disk
from cowfs.formats.rebase import rebase

K = 1 << 10
SECTOR = 512
CLUSTER = 4096
SHORT, LONG = Backing("short", "raw"), Backing("long", "raw")
#: bytes of the disk at first, what is below at first, and of what may be below later
SIZE, BELOW, LONGER = 600 * K + 512, 300 * K + 700, 700 * K

#: each as often as it stands here
KINDS = ["write"] * 5 + ["drop"] * 4 + ["all at once"] * 3 + ["zero", "copy up", "grow", "rebase"] * 2
KINDS += ["settle", "compact", "reopen", "crash"]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.one_of(st.integers(0, 150).map(lambda number: number * CLUSTER), st.integers(0, SIZE)),
        st.one_of(st.integers(1, 40).map(lambda number: number * CLUSTER), st.integers(1, 9000)),
    ),
    min_size=10,
    max_size=30,
)


class Session:
    """An image, open for writing; what the disk holds, and what of it is there when nothing of it is in the image."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk.qed"
        content = pattern(LONGER, 5)
        # the same content as far as it goes, so that changing from one to the other shows where one is longer
        for name, length in (("short", BELOW), ("long", LONGER)):
            (folder / name).write_bytes(content[:length])
        self.content = content
        self.below = bytearray(content[:BELOW].ljust(SIZE, b"\0"))
        self.model = bytearray(self.below)
        self.count = 0

    async def open(self) -> None:
        self.disk: Disk = await open_disk(str(self.path), "qed", writable=True, copy_on_read=False)

    async def do(self, operation: str, place: int, length: int) -> None:
        self.count += 1
        await getattr(self, f"do_{operation.replace(' ', '_')}")(place % len(self.model), length)

    def cut(self, offset: int, length: int) -> int:
        return min(length, len(self.model) - offset)

    async def do_write(self, offset: int, length: int) -> None:
        data = pattern(self.cut(offset, length), self.count)
        if not self.disk.write_now(offset, data):
            await self.disk.write(offset, data)
        self.model[offset : offset + len(data)] = data

    async def do_zero(self, offset: int, length: int) -> None:
        length = self.cut(offset, length)
        await self.disk.zero_layer(0, offset, length)
        self.model[offset : offset + length] = bytes(length)

    async def do_drop(self, offset: int, length: int) -> None:
        """What growing or changing the backing file hid would come to light: drop only where it has not."""
        offset = offset % (BELOW // CLUSTER) * CLUSTER
        length = min(max(length // CLUSTER, 1) * CLUSTER, BELOW // CLUSTER * CLUSTER - offset)
        if self.disk.layers[0].backing is not None:
            await drop(self.disk, offset, length)
            self.model[offset : offset + length] = self.below[offset : offset + length]

    async def do_copy_up(self, offset: int, length: int) -> None:
        await self.disk.copy_up(offset, self.cut(offset, length))

    async def do_grow(self, _: int, length: int) -> None:
        sectors = length % 200
        await self.disk.grow(len(self.model) + sectors * SECTOR)
        self.model.extend(bytes(sectors * SECTOR))

    async def do_rebase(self, _: int, which: int) -> None:
        """Onto another backing file, or none, with the content as it is, by the command's own code."""
        await self.disk.close()
        await rebase(str(self.path), "qed", (SHORT, LONG, None, SHORT, LONG)[which % 5], lambda done, total: None)
        await self.open()

    async def do_settle(self, _: int, __: int) -> None:
        await self.disk.flush()
        await self.disk.layers[0].image.settle()
        assert not Read(self.path).features & NEED_CHECK

    async def do_compact(self, _: int, __: int) -> None:
        await self.disk.compact()
        assert not Read(self.path).leaks

    async def do_all_at_once(self, _: int, __: int) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                self.count += 1
                nursery.start_soon(self.do_write, number * 97 * K % len(self.model), 5000)

    async def do_reopen(self, _: int, __: int) -> None:
        await self.disk.close()
        assert_clean(self.path)
        assert qemu_content(self.path) == self.model
        await self.open()

    async def do_crash(self, _: int, __: int) -> None:
        """After a flush; so nothing is lost."""
        await self.disk.flush()
        await crash(self.disk)
        await self.open()

    async def verify(self) -> None:
        assert await self.disk.read(0, self.disk.size) == self.model
        await self.disk.flush()
        read = Read(self.path)
        assert read.size == len(self.model)
        assert not read.leaks or read.features & NEED_CHECK


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS, table_size=st.sampled_from(["2", "4", "16"]))
def test_random_operations_against_a_byte_array(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, int]], table_size: str
) -> None:
    async def main() -> None:
        session = Session(tmp_path_factory.mktemp("session"))
        await make(session.path, SIZE, SHORT, cluster_size=str(CLUSTER), table_size=table_size)
        await session.open()
        await session.do_write(40 * K, 200 * K)
        for operation, place, length in operations:
            await session.do(operation, place, length)
            await session.verify()
        await session.do_reopen(0, 0)
        await session.disk.close()

    trio.run(main)

"""Disks of all kinds over NBD, written at random while the server loses connections, and its memory."""

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbdhostile import HostileServer, serving

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.formats.chain import Opening, open_disk
from cowfs.formats.create import create_image
from cowfs.storage import Network

SIZE = 700_416
HOST = 2 << 20
#: what is on the server, and the format of an overlay on it here, if there is one
KINDS = [
    ("raw", None),
    ("qcow2", None),
    ("raw", "qcow2"),
    ("raw", "qed"),
    ("qcow2", "qcow2"),
]
OPENING = Opening(network=Network(10, 30))
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "read", "zero", "flush", "copy_up", "reopen", "drop", "crash"]),
        st.integers(0, SIZE - 1),
        st.one_of(st.integers(1, 5000), st.integers(1, 200_000), st.sampled_from([512, 4096, 65_536])),
    ),
    max_size=25,
)


class Stack:
    """A disk, and what it ought to hold."""

    def __init__(self, folder: Path, server: HostileServer, kind: tuple[str, str | None]) -> None:
        self.folder = folder
        self.server = server
        self.below, self.above = kind
        self.name = server.uri if self.above is None else str(folder / "top")
        self.model = bytearray(SIZE)

    @property
    def format(self) -> str:
        return self.above or self.below

    async def build(self, rnd: random.Random) -> None:
        if self.below == "raw":
            self.model = bytearray(rnd.randbytes(HOST))
            self.server.content[:] = self.model
            self.server.durable = bytes(self.model)
        else:
            await create_image(self.server.uri, self.below, SIZE)
        if self.above is not None:
            await create_image(self.name, self.above, None, Backing(self.server.uri, self.below))

    async def open(self) -> Disk:
        return await open_disk(self.name, self.format, writable=True, opening=OPENING)

    async def apply(self, disk: Disk, rnd: random.Random, operation: str, offset: int, length: int) -> Disk:
        length = min(length, SIZE - offset)
        if operation == "write":
            data = rnd.randbytes(length)
            self.model[offset : offset + length] = data
            if not disk.write_now(offset, data):
                await disk.write(offset, data)
        elif operation == "zero":
            self.model[offset : offset + length] = bytes(length)
            async with disk.lock.hold(0, HOST):
                await disk.zero_layer(0, offset, length)
        elif operation == "read":
            assert await disk.read(offset, length) == self.model[offset : offset + length]
        elif operation == "flush":
            await disk.flush()
        elif operation == "copy_up":
            await disk.copy_up(offset, length)
        elif operation == "reopen":
            await disk.close()
            return await self.open()
        elif operation == "drop":
            self.server.drop()
        else:
            self.server.crash()
        return disk

    def judge(self) -> None:
        """Ask QEMU about what is on the server, and the overlay on it."""
        host, top = self.folder / "host", self.folder / "top"
        host.write_bytes(self.server.content)
        (self.folder / "flat").write_bytes(self.model)
        if self.below != "raw":
            _run("qemu-img", "check", "-f", self.below, str(host))
        if self.above is not None:
            _run("qemu-img", "rebase", "-u", "-f", self.above, "-b", str(host), "-F", self.below, str(top))
            _run("qemu-img", "check", "-f", self.above, str(top))
        image = str(host if self.above is None else top)
        _run("qemu-img", "compare", "-f", "raw", "-F", self.format, str(self.folder / "flat"), image)


def _run(*words: str) -> None:
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " under ".join(filter(None, kind)))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS, seed=st.integers(0, 1000))
def test_disks_are_what_was_written_to_them(
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, str | None],
    operations: Sequence[tuple[str, int, int]],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("stack")
    rnd = random.Random(seed)

    async def main() -> Stack:
        async with serving(folder / "socket", bytes(HOST)) as server:
            stack = Stack(folder, server, kind)
            await stack.build(rnd)
            disk = await stack.open()
            for operation, offset, length in operations:
                disk = await stack.apply(disk, rnd, operation, offset, length)
            server.crash()
            assert await disk.read(0, disk.size) == stack.model
            await disk.close()
            server.crash()
            return stack

    trio.run(main).judge()


async def test_a_flush_needs_nothing_of_a_server_that_is_away(tmp_path: Path) -> None:
    """A part of a cluster is filled up when it is written, and not when the server may be gone."""
    async with serving(tmp_path / "socket", random.Random(1).randbytes(HOST)) as server, trio.open_nursery() as nursery:
        stack = Stack(tmp_path, server, ("raw", "qcow2"))
        await stack.build(random.Random(2))
        disk = await open_disk(stack.name, "qcow2", writable=True, opening=Opening(network=Network(10, 0)))
        await nursery.start(disk.run)
        for offset in (1024, 300_032, 100_352):
            await stack.apply(disk, random.Random(offset), "write", offset, 512)
        server.cut = 0
        server.drop()
        await disk.flush()
        assert await disk.read(65_536, 65_536) == stack.model[65_536:131_072]
        nursery.cancel_scope.cancel()
    await disk.close()

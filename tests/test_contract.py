"""The contract suite: whatever can be written passes it, every format alone and stacks of formats.

A format is added to `FORMATS`; that is all it takes to be held to the contract.
"""

import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowfs.block.disk import Disk
from cowfs.block.extent import NO_OFFSET, Kind
from cowfs.block.image import Backing
from cowfs.errors import OutOfRange, ReadOnly
from cowfs.formats.chain import open_disk, open_image
from cowfs.formats.registry import format_named
from cowfs.jobs.commit import Commit
from cowfs.storage import FileStorage


@dataclass(frozen=True)
class Make:
    """How one layer is made."""

    format: str
    options: dict[str, str] = field(default_factory=dict)


RAW = Make("raw")
FORMATS = {
    "qcow2": Make("qcow2"),
    "qcow2-512": Make("qcow2", {"cluster_size": "512", "refcount_bits": "1"}),
    "qcow2-v2": Make("qcow2", {"cluster_size": "4k", "compat": "0.10"}),
    "qcow2-ext": Make("qcow2", {"extended_l2": "on"}),
    "qcow2-ext-16k": Make("qcow2", {"extended_l2": "on", "cluster_size": "16k"}),
    "qcow2-data": Make("qcow2", {"cluster_size": "4k", "data_file": "data"}),
    "qed": Make("qed"),
    "qed-4k": Make("qed", {"cluster_size": "4k", "table_size": "2"}),
}
#: active layer first
STACKS: dict[str, tuple[Make, ...]] = {
    "raw": (RAW,),
    "qcow2-data-raw": (Make("qcow2", {"data_file": "data", "data_file_raw": "on"}),),
    **{name: (make,) for name, make in FORMATS.items()},
    **{f"{name} on raw": (make, RAW) for name, make in FORMATS.items()},
    "qed on qcow2": (FORMATS["qed-4k"], FORMATS["qcow2"]),
    "qcow2 on qed": (FORMATS["qcow2"], FORMATS["qed-4k"]),
    "qcow2-512 on qed on qcow2-v2 on raw": (FORMATS["qcow2-512"], FORMATS["qed"], FORMATS["qcow2-v2"], RAW),
}
SIZE = 700_416


def _name_of(layers: tuple[Make, ...]) -> str:
    return next(name for name, known in STACKS.items() if known == layers)


class Stack:
    """A chain on disk, and what a guest ought to see of it."""

    def __init__(self, folder: Path, layers: tuple[Make, ...], sizes: tuple[int, ...], seed: int = 1) -> None:
        self.folder = folder
        self.layers = layers
        self.sizes = sizes
        self.model = bytearray()
        self.seed = seed

    @property
    def top(self) -> Path:
        return self.folder / "layer0"

    async def build(self) -> None:
        """Make the layers from the bottom up, each with some bytes of its own."""
        for number in reversed(range(len(self.layers))):
            path, make, size = self.folder / f"layer{number}", self.layers[number], self.sizes[number]
            below = number + 1 < len(self.layers)
            backing = Backing(f"layer{number + 1}", self.layers[number + 1].format) if below else None
            storage = FileStorage.create(str(path))
            await format_named(make.format).create(storage, size, backing, make.options)
            await storage.close()
            self.model = bytearray(self.model[:size].ljust(size, b"\0"))
            rnd = random.Random(self.seed * 100 + number)
            await self.run(lambda disk, rnd=rnd: self._scribble(disk, rnd), path)  # type: ignore[misc]

    async def _scribble(self, disk: Disk, rnd: random.Random) -> None:
        for _ in range(4):
            offset = rnd.randrange(disk.size)
            await self.write(disk, offset, rnd.randbytes(min(rnd.randrange(1, 90_000), disk.size - offset)))

    async def run(self, use: "Callable[[Disk], object]", path: Path | None = None) -> None:
        disk = await open_disk(str(path or self.top), self.layers[0].format if path is None else None, writable=True)
        try:
            await use(disk)  # type: ignore[misc]
        finally:
            await disk.close()

    async def write(self, disk: Disk, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        if not disk.write_now(offset, data):
            await disk.write(offset, data)

    async def zero(self, disk: Disk, offset: int, length: int, *, unmap: bool = True) -> None:
        self.model[offset : offset + length] = bytes(length)
        await disk.write_zeroes(offset, length, unmap=unmap)

    async def read(self, disk: Disk, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        if not disk.readinto_now(offset, memoryview(buffer)):
            await disk.readinto(offset, memoryview(buffer))
        assert await disk.read(offset, length) == buffer, "both ways to read agree"
        return bytes(buffer)

    async def verify(self, disk: Disk) -> None:
        assert disk.size == len(self.model)
        assert await disk.read(0, disk.size) == self.model
        await check_mapping(disk)

    def judge(self) -> None:
        """Ask QEMU: every layer is clean, and the chain has the content that it should have."""
        for number, make in enumerate(self.layers):
            if make.format != "raw":
                found = subprocess.run(
                    ["qemu-img", "check", "-f", make.format, str(self.folder / f"layer{number}")],
                    cwd=self.folder,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert found.returncode == 0, found.stdout + found.stderr
        flat = self.folder / "flat"
        flat.write_bytes(self.model)
        same = subprocess.run(
            ["qemu-img", "compare", "-f", "raw", "-F", self.layers[0].format, str(flat), str(self.top)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert same.returncode == 0, same.stdout + same.stderr


async def check_mapping(disk: Disk) -> None:
    """Extents cover what was asked for, in order, merged, and from memory they say the same."""
    for layer in disk.layers:
        for offset, length in ((0, disk.size), (1, disk.size - 1), (disk.size // 3, disk.size // 2)):
            extents = await layer.map(offset, length)
            assert extents == layer.map_now(offset, length)
            position = offset
            for extent in extents:
                assert extent.offset == position
                assert extent.length > 0
                if extent.kind in (Kind.DATA, Kind.SHARED):
                    assert extent.host_offset >= 0
                if extent.kind is Kind.UNALLOCATED and layer.unit == layer.cluster_size:
                    # a subcluster has its place before it has content
                    assert extent.host_offset == NO_OFFSET
                position = extent.end
            assert position == offset + length


@pytest.fixture(params=STACKS)
def layers(request: pytest.FixtureRequest) -> tuple[Make, ...]:
    return STACKS[request.param]


@pytest.fixture
async def stack(tmp_path: Path, layers: tuple[Make, ...]) -> Stack:
    made = Stack(tmp_path, layers, (SIZE,) * len(layers))
    await made.build()
    return made


async def test_reads_of_every_alignment(stack: Stack) -> None:
    async def use(disk: Disk) -> None:
        for offset, length in (
            (0, 1),
            (0, SIZE),
            (1, SIZE - 1),
            (SIZE - 1, 1),
            (511, 2),
            (4095, 130_000),
            (65_535, 2),
            (65_536, 65_536),
            (100_000, 400_000),
        ):
            assert await stack.read(disk, offset, length) == stack.model[offset : offset + length]

    await stack.run(use)
    stack.judge()


async def test_writes_of_every_alignment(stack: Stack) -> None:
    rnd = random.Random(4)

    async def use(disk: Disk) -> None:
        for offset, length in (
            (0, 1),
            (SIZE - 1, 1),
            (511, 2),
            (4095, 130_000),
            (65_535, 2),
            (65_536, 65_536),
            (131_072, 4096),
            (135_168, 4096),
            (300_000, 200_000),
            (299_999, 3),
        ):
            await stack.write(disk, offset, rnd.randbytes(length))
            await stack.verify(disk)

    await stack.run(use)
    stack.judge()
    await stack.run(stack.verify)


async def test_zeros_of_every_alignment(stack: Stack) -> None:
    async def use(disk: Disk) -> None:
        for offset, length in (
            (0, 1),
            (SIZE - 1, 1),
            (511, 2),
            (4095, 130_000),
            (65_536, 65_536),
            (131_072, 4096),
            (300_000, 200_000),
            (299_999, 3),
            (SIZE - 70_000, 70_000),
        ):
            await stack.zero(disk, offset, length, unmap=False)
            await stack.verify(disk)
            await stack.write(disk, offset, b"w" * length)
            await stack.zero(disk, offset, length)
            await stack.verify(disk)
        await stack.write(disk, 100_000, b"again" * 10_000)
        await stack.verify(disk)

    await stack.run(use)
    stack.judge()
    await stack.run(stack.verify)


async def test_fragmented_images(stack: Stack) -> None:
    """Clusters written backwards and in strides, so that neighbours of the guest are none in the file."""
    rnd = random.Random(5)

    async def use(disk: Disk) -> None:
        for stride in (7, 3):
            for number in reversed(range(0, SIZE // 4096 - 1, stride)):
                await stack.write(disk, number * 4096, rnd.randbytes(4096))
        for offset in range(0, SIZE - 100_000, 33_333):
            assert await stack.read(disk, offset, 100_000) == stack.model[offset : offset + 100_000]
        await stack.verify(disk)

    await stack.run(use)
    stack.judge()


@pytest.mark.parametrize("sizes", [(SIZE, 300_544, 500_224, 100_352), (300_544, SIZE, 200_192, SIZE)])
async def test_layers_of_different_sizes(tmp_path: Path, layers: tuple[Make, ...], sizes: tuple[int, ...]) -> None:
    stack = Stack(tmp_path, layers, sizes[: len(layers)], seed=7)
    await stack.build()

    async def use(disk: Disk) -> None:
        await stack.verify(disk)
        for offset in range(300_000, min(disk.size - 10, 301_000), 100):
            await stack.write(disk, offset, b"0123456789")
        await stack.write(disk, disk.size - 5, b"last!")
        await stack.verify(disk)

    await stack.run(use)
    stack.judge()


async def test_growing(stack: Stack) -> None:
    async def use(disk: Disk) -> None:
        await disk.grow(SIZE + 1_000_448)
        stack.model += bytes(1_000_448)
        await stack.verify(disk)
        await stack.write(disk, SIZE + 1_000_000, b"far out")
        await stack.verify(disk)

    await stack.run(use)
    await stack.run(stack.verify)
    stack.judge()


async def test_requests_beyond_the_end_are_refused(stack: Stack) -> None:
    async def use(disk: Disk) -> None:
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (1 << 62, 512)):
            view = memoryview(bytearray(length))
            with pytest.raises(OutOfRange):
                disk.readinto_now(offset, view)
            with pytest.raises(OutOfRange):
                await disk.readinto(offset, view)
            with pytest.raises(OutOfRange):
                disk.write_now(offset, view)
            with pytest.raises(OutOfRange):
                await disk.write(offset, view)
            with pytest.raises(OutOfRange):
                await disk.discard(offset, length)

    await stack.run(use)
    stack.judge()


async def test_a_disk_that_is_open_read_only_changes_nothing(stack: Stack) -> None:
    before = {path.name: path.read_bytes() for path in stack.folder.iterdir()}
    disk = await open_disk(str(stack.top))
    await stack.verify(disk)
    with pytest.raises(ReadOnly):
        disk.write_now(0, b"x")
    with pytest.raises(ReadOnly):
        await disk.write(0, b"x")
    with pytest.raises(ReadOnly):
        await disk.discard(0, 1)
    with pytest.raises(ReadOnly):
        await disk.grow(SIZE * 2)
    await disk.close()
    assert {path.name: path.read_bytes() for path in stack.folder.iterdir()} == before


async def test_filling_the_overlay_and_dropping_the_backing(stack: Stack) -> None:
    async def use(disk: Disk) -> None:
        await disk.copy_up(0, disk.size)
        await stack.verify(disk)
        if len(disk.layers) > 1:
            await disk.drop_backing()
        await stack.verify(disk)

    await stack.run(use)
    for number in range(1, len(stack.layers)):
        (stack.folder / f"layer{number}").unlink()
    stack.layers = stack.layers[:1]
    await stack.run(stack.verify)
    stack.judge()


@pytest.mark.parametrize("layers", [layers for layers in STACKS.values() if len(layers) > 1], ids=_name_of)
async def test_linking_to_another_backing_file(stack: Stack) -> None:
    """What is below is flattened into a new file of another name, format and size; then the link is dropped."""
    below: list[bytes] = []

    async def flatten(disk: Disk) -> None:
        below.append(bytes(await disk.read(0, disk.size, 1)))
        await stack.write(disk, 1, b"not flushed yet")

    await stack.run(flatten)
    for name, make in (("a longer name for the same bytes", RAW), ("short", FORMATS["qed"]), ("layer1", RAW)):
        path = stack.folder / name
        path.unlink(missing_ok=True)
        storage = FileStorage.create(str(path))
        await format_named(make.format).create(storage, len(below[0]), None, make.options)
        await storage.close()
        base = await open_disk(str(path), make.format, writable=True)
        await base.write(0, below[0])
        await base.close()
        backing = Backing(name, make.format)

        async def link(disk: Disk, backing: Backing = backing) -> None:
            await stack.write(disk, SIZE // 2, b"linked")
            await disk.layers[0].set_backing(backing)
            assert disk.layers[0].backing == backing

        await stack.run(link)
        stack.layers = (stack.layers[0], make)
        await stack.run(stack.verify)
        image = await open_image(str(stack.top))
        assert image.backing is not None
        assert image.backing.name == name
        assert image.backing.format in (make.format, None), "QED records of a format only whether it is raw"
        await image.close()
    stack.judge()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "read", "flush", "copy_up", "reopen", "discard", "zero"]),
        st.integers(0, SIZE - 1),
        st.one_of(st.integers(1, 5000), st.integers(1, 200_000), st.sampled_from([512, 4096, 65_536])),
    ),
    max_size=25,
)


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS, seed=st.integers(0, 1000))
def test_random_operations_against_a_byte_array(
    tmp_path_factory: pytest.TempPathFactory, name: str, operations: list[tuple[str, int, int]], seed: int
) -> None:
    stack = Stack(tmp_path_factory.mktemp("stack"), STACKS[name], (SIZE,) * len(STACKS[name]), seed)
    rnd = random.Random(seed)

    async def main() -> None:
        await stack.build()
        disk = await open_disk(str(stack.top), writable=True)
        for operation, offset, length in operations:
            length = min(length, SIZE - offset)
            if operation == "write":
                await stack.write(disk, offset, rnd.randbytes(length))
            elif operation == "read":
                assert await stack.read(disk, offset, length) == stack.model[offset : offset + length]
            elif operation == "flush":
                await disk.flush()
            elif operation in ("discard", "zero"):
                await stack.zero(disk, offset, length, unmap=operation == "discard")
            elif operation == "copy_up":
                await disk.copy_up(offset, length)
            else:
                await disk.close()
                disk = await open_disk(str(stack.top), writable=True)
        await stack.verify(disk)
        await disk.close()

    trio.run(main)
    stack.judge()


@pytest.mark.parametrize("format", ["qcow2", "qed"])
async def test_growing_shows_nothing_of_what_lay_behind_the_end(tmp_path: Path, format: str) -> None:
    """QEMU copies whole clusters of a longer backing file, also what the disk has no use for."""
    size = (2 << 20) + 32_768

    def run(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, cwd=tmp_path)

    (tmp_path / "base").write_bytes(b"\xaa" * (4 << 20))
    run("qemu-img", "create", "-q", "-f", format, "-b", "base", "-F", "raw", "middle", str(size))
    run("qemu-io", "-f", format, "-c", "write -P 0xbb 2M 4k", "middle")
    run("qemu-img", "create", "-q", "-f", format, "-b", "middle", "-F", format, "top", "3M")
    expected = b"\xaa" * (2 << 20) + b"\xbb" * 4096 + b"\xaa" * 28_672 + bytes((1 << 20) - 32_768)
    disk = await open_disk(str(tmp_path / "top"), writable=True)
    assert await disk.read(0, disk.size) == expected
    await Commit(disk).run()
    assert await disk.read(0, disk.size) == expected
    await disk.close()
    disk = await open_disk(str(tmp_path / "middle"), writable=True)
    assert await disk.read(0, disk.size) == expected
    await disk.close()
    run("qemu-img", "convert", "-O", "raw", "middle", "flat")
    assert (tmp_path / "flat").read_bytes() == expected
    run("qemu-img", "check", "middle")

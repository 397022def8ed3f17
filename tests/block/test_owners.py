"""What is remembered of the layers below: always the same as asking each of them."""

import random
from pathlib import Path

import pytest
from chains import MIXED, PLANS, SIZE, ChainFiles, Plan, Writer
from commandline import ok, qemu_img

from cowfs.block import owners
from cowfs.block.disk import Disk
from cowfs.block.owners import Piece


def fine(cluster_size: int, depth: int) -> Plan:
    small: dict[str, object] = {"cluster_size": cluster_size}
    return [("raw", {}, SIZE), *[("qcow2", small, SIZE)] * depth]


TINY, DEEP = fine(512, 3), fine(4096, 11)


def walked(disk: Disk, depth: int, offset: int, length: int) -> list[Piece]:
    """The same, without remembering anything: layer by layer, and byte ranges joined."""
    found = []
    for extent in disk.layers[depth].map_now(offset, length) or pytest.fail("metadata is missing"):
        if extent.kind.name == "UNALLOCATED" and depth + 1 < len(disk.layers):
            found += walked(disk, depth + 1, extent.offset, extent.length)
        else:
            found.append(Piece(depth, extent))
    return found


async def same(disk: Disk, rnd: random.Random, count: int = 300) -> None:
    await disk.read(0, disk.size)
    for _ in range(count):
        length = min(rnd.choice([512, 4096, 70_000, 3 << 20]), disk.size)
        offset = rnd.randrange((disk.size - length) // 512 + 1) * 512
        assert disk.resolve_now(disk.layers, 0, offset, length) == walked(disk, 0, offset, length)


def remembered(disk: Disk) -> int:
    return len(disk._owners._regions)


@pytest.mark.parametrize("plan", [*PLANS.values(), TINY, DEEP], ids=[*PLANS, "tiny", "deep"])
async def test_it_is_what_the_layers_say(tmp_path: Path, plan: Plan) -> None:
    files = ChainFiles(tmp_path, plan)
    rnd = random.Random(1)
    async with files.opened() as disk:
        await same(disk, rnd)
        assert remembered(disk)
        writer = Writer(disk, files.views[-1])
        for _ in range(100):
            await writer.write()
            await writer.read()
        await same(disk, rnd)


async def test_compressed_clusters(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, MIXED)
    packed = tmp_path / "packed.qcow2"
    ok(qemu_img("convert", "-c", "-O", "qcow2", "-B", files.paths[1].name, "-F", "qed", files.paths[2], packed))
    packed.replace(files.paths[2])
    async with files.opened() as disk:
        await same(disk, random.Random(2))
        assert await disk.read(0, disk.size) == files.views[-1]


async def test_a_layer_that_is_written_to_is_looked_at_anew(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, PLANS["plain"])
    async with files.opened() as disk:
        await same(disk, random.Random(3))
        await disk.set_layer_writable(2, True)
        await same(disk, random.Random(4))
        assert not remembered(disk)
        for offset in range(0, SIZE, 200_000):
            await disk.write_layer(2, offset, memoryview(b"new" * 1000))
        await disk.zero_layer(2, 1 << 20, 1 << 20)
        await same(disk, random.Random(5))
        await disk.set_layer_writable(2, False)
        await same(disk, random.Random(6))
        assert remembered(disk)


async def test_it_knows_the_chain_as_it_has_become(tmp_path: Path) -> None:
    files = ChainFiles(tmp_path, DEEP)
    async with files.opened() as disk:
        await same(disk, random.Random(7))
        for layer in await disk.cut_out(0, 5, disk.layers[4].backing, disk.size) or ():
            await layer.close()
        await same(disk, random.Random(8))


async def test_it_forgets_the_oldest_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "BOUND", 40)
    monkeypatch.setattr(owners, "REGION", 256 << 10)
    files = ChainFiles(tmp_path, DEEP)
    async with files.opened() as disk:
        await same(disk, random.Random(9), 2000)
        assert 0 < remembered(disk) <= 24
        assert disk._owners._kept == sum(len(region.pieces) for region in disk._owners._regions.values())

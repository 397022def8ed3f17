"""QED images, damaged at random: cowfs and QEMU find the same, and each is content with what the other repairs.

``COWFS_DAMAGE_ROUNDS=50 scripts/test tests/formats/test_qed_damage.py`` makes many more of them.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from imagetools import check_image, readable_clusters
from qedtools import M, header_on_disk, qemu_check, qemu_create, qemu_io

from cowfs.block.check import CheckResult, Repair
from cowfs.formats.qed.layout import Feature

#: images of each kind
ROUNDS = int(os.environ.get("COWFS_DAMAGE_ROUNDS", "2"))
KINDS = ["4k,table_size=2", "4k,table_size=16", "64k,table_size=4"]


def make_damaged(path: Path, kind: str, seed: int) -> None:
    rnd = random.Random(f"{kind} {seed}")
    qemu_create(path, 16 * M, "-o", f"cluster_size={kind}")
    commands = []
    for _ in range(12):
        offset = rnd.randrange(16 * M // 4096 - 32) * 4096
        commands.append(f"write {rnd.choice(['-z', '-P 7', '-P 9'])} {offset} {rnd.choice([4096, 65536, 131_072])}")
    qemu_io(path, *commands)
    image, header = bytearray(path.read_bytes()), header_on_disk(path)

    def get(place: int) -> int:
        return int.from_bytes(image[place : place + 8], "little")

    def used(table: int) -> list[int]:
        return [place for place in range(table, table + header.table_bytes, 8) if get(place) > 1]

    tables = used(header.l1_offset)
    entries = [place for table in tables for place in used(get(table))]
    end = len(image)
    for _ in range(rnd.randrange(1, 5)):
        place = rnd.choice(tables if rnd.random() < 0.2 else entries)
        values = [0, 1, 2, get(place) + 512, get(rnd.choice(entries)), end, end - header.cluster_size, 1 << 40]
        image[place : place + 8] = rnd.choice([*values, header.l1_offset]).to_bytes(8, "little")
    if rnd.random() < 0.3:
        image[16] |= Feature.NEED_CHECK
    if rnd.random() < 0.2:
        del image[-rnd.randrange(1, 3) * header.cluster_size :]
    elif rnd.random() < 0.2:
        image += bytes(rnd.randrange(1, 3) * header.cluster_size)
    path.write_bytes(image)


def entry_of(path: Path, number: int) -> int:
    """Return the L2 entry of a guest's cluster."""
    image, header = path.read_bytes(), header_on_disk(path)
    l1_index, index = divmod(number, header.table_bytes // 8)
    place = header.l1_offset + 8 * l1_index
    place = int.from_bytes(image[place : place + 8], "little") + 8 * index
    return int.from_bytes(image[place : place + 8], "little")


async def assert_same(path: Path) -> CheckResult:
    found, theirs = await check_image(path, "qed"), qemu_check(path)
    assert (found.corruptions, found.leaks) == (theirs.get("corruptions", 0), theirs.get("leaks", 0)), found.messages
    assert found.allocated_clusters == theirs.get("allocated-clusters", 0)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_cowfs_and_qemu_agree(tmp_path: Path, kind: str, seed: int) -> None:
    make_damaged(path := tmp_path / "image", kind, seed)
    await assert_same(path)
    before = await readable_clusters(path, "qed")
    for how in (Repair.LEAKS, Repair.ALL):
        shutil.copy(path, mine := tmp_path / "mine")
        repaired = await check_image(mine, "qed", how)
        found = await assert_same(mine)
        assert (found.corruptions, found.leaks) == (repaired.corruptions, repaired.leaks)
        after = await readable_clusters(mine, "qed")
        metadata = header_on_disk(path).l1_offset + header_on_disk(path).table_bytes
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            # an entry that leads to L1 shows the repair of that
            assert old in (None, new) or 0 < entry_of(path, number) < metadata
        if how is Repair.ALL:
            # "-r leaks" says the same to QEMU; cowfs leaves damage alone then
            shutil.copy(path, qemus := tmp_path / "qemus")
            qemu_check(qemus, "-r", how.value)
            theirs = await assert_same(qemus)
            # what stays is clusters with two users, of which neither can let go; QEMU drops entries of a table all the
            # same that may be somebody's data
            assert found.corruptions >= theirs.corruptions
            assert bool(found.corruptions) == any("use" in message for message in found.messages)
        assert found.corruptions or not found.leaks

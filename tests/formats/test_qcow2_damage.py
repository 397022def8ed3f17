"""Images of all kinds, damaged at random: cowfs and QEMU find the same, and each is content with the other's repair.

``COWFS_DAMAGE_ROUNDS=50 scripts/test tests/formats/test_qcow2_damage.py`` makes many more of them.
"""

import json
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import qcow2damage
from commandline import ok, qemu_img, qemu_io
from imagetools import check_image, readable_clusters
from qcow2damage import KINDS, MASK, Anatomy
from storages import MemoryStorage

from cowfs.block.check import Repair
from cowfs.cli.check import CORRUPT, LEAKS
from cowfs.errors import CowfsError
from cowfs.formats import qcow2

#: images of each kind
ROUNDS = int(os.environ.get("COWFS_DAMAGE_ROUNDS", "2"))


class Verdict(NamedTuple):
    """Corruptions and leaks, None if there was no check; the exit code; and what was said."""

    found: tuple[int, int] | None
    code: int
    words: str


def theirs(path: Path, *options: str) -> Verdict:
    try:
        done = qemu_img("check", "-f", "qcow2", "--output=json", *options, path)
    except subprocess.TimeoutExpired:
        # it looks for room for counts cluster by cluster, from a block that is said to be far out
        return Verdict(None, 1, "took too long")
    found = json.loads(done.stdout) if done.stdout else {"check-errors": 1}
    if found["check-errors"]:
        return Verdict(None, 1, done.stderr)
    return Verdict((found.get("corruptions", 0), found.get("leaks", 0)), done.returncode, done.stderr)


async def ours(path: Path, repair: Repair = Repair.NONE) -> Verdict:
    try:
        result = await check_image(path, "qcow2", repair)
    except CowfsError as error:
        return Verdict(None, 1, str(error))
    code = CORRUPT if result.corruptions else LEAKS if result.leaks else 0
    return Verdict((result.corruptions, result.leaks), code, "\n".join(result.messages))


def assert_same(mine: Verdict, qemu: Verdict) -> None:
    """Assert that both found the same, as far as QEMU is right."""
    if qemu.found is None:
        # it gives up: on bitmaps that it cannot load, on refcount blocks in no place for one (each count is an
        # error of its own then), and with -r leaks on whatever would need new refcount blocks
        assert mine.code
    elif is_cut_off(mine):
        # it takes the missing part of a table for zeros: all that was mapped there is lost without a word
        assert mine.code in (1, CORRUPT)
    elif mine.words.endswith("too many to check"):
        # it has put new refcount blocks so far out that the file would have 2^30 clusters
        assert mine.found is None
    else:
        assert mine[:2] == qemu[:2], (mine.words, qemu.words)


def is_cut_off(verdict: Verdict) -> bool:
    """Whether the file ends before one of its tables does."""
    if verdict.found is None:
        return "beyond the end of the file" in verdict.words
    return "is cut off by the end of the file" in verdict.words


async def content(path: Path) -> list[bytes | None]:
    """Content of the disk by clusters; None where it cannot be read."""
    try:
        return await readable_clusters(path, "qcow2")
    except CowfsError:
        return []


def make_damaged(path: Path, kind: str, seed: int) -> None:
    rnd = random.Random(f"{kind} {seed}")
    backing = None
    if rnd.random() < 0.4:
        backing = path.with_name("backing")
        backing.write_bytes(random.Random(5).randbytes(3 << 20))
    qcow2damage.make_kind(path, kind, rnd, backing=backing)
    image = Anatomy(path)
    for _ in range(rnd.randrange(1, 4)):
        try:
            rnd.choice([qcow2damage.damage_entries, qcow2damage.damage_more])(image, rnd)
        except (IndexError, struct.error):
            # what was to be damaged is gone already
            break
    image.write(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_cowfs_and_qemu_agree(tmp_path: Path, kind: str, seed: int) -> None:
    make_damaged(path := tmp_path / "image", kind, seed)
    assert_same(await ours(path), theirs(path))
    before = await content(path)
    for how in (Repair.LEAKS, Repair.ALL):
        shutil.copy(path, mine := tmp_path / "mine")
        shutil.copy(path, qemus := tmp_path / "qemus")
        repaired, by_qemu = await ours(mine, how), theirs(qemus, "-r", how.value)
        assert_same(repaired, theirs(mine))
        assert_same(await ours(qemus), theirs(qemus))
        # with 1-bit counts QEMU overlooks that a refcount block is in use for something else, and writes to it
        if how is Repair.LEAKS and "more references than fit" not in repaired.words:
            assert_same(repaired, by_qemu)
        if how is Repair.ALL:
            # without its L1 or snapshot table an image is not opened at all
            assert repaired.code == 0 or (repaired.found is None and is_cut_off(repaired)), repaired.words
        after = await content(mine)
        assert len(after) == len(before)
        assert all(new == old for new, old in zip(after, before, strict=True) if old is not None)


async def test_counts_of_what_was_cut_off_are_held_against_the_flags(tmp_path: Path) -> None:
    """As QEMU does: flags that agree with the counts are no errors beside that of the missing cluster."""
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path := tmp_path / "image", "4M"))
    qemu_io(path, "qcow2", "write -P 1 0 256k")
    image = Anatomy(path)
    del image.data[-10 * 4096 :]
    block = image.get(image.blocks()[0]) & MASK
    for lost in (3, 4):
        image.put(block + 2 * ((len(image.data) >> 12) + lost), 2, 2)
    image.write(path)
    found = await ours(path)
    assert found.found == theirs(path).found == (12, 0)


async def test_a_check_reads_one_table_after_the_other(tmp_path: Path) -> None:
    """So what it needs at once does not grow with the tables, but for some bytes a cluster."""
    ok(
        qemu_img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata", path := tmp_path / "i", "32M"
        )
    )

    storage = MemoryStorage("image", path.read_bytes(), cold=True)
    image = await qcow2.open_image(storage)
    storage.log.clear()
    result = await image.check()
    assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 8192)
    reads = [length for operation, _, length in storage.log if operation == "read"]
    # 16 L2 tables, 5 blocks of counts
    assert (len(reads), max(reads)) == (21, 4096)
    assert image.tables.resident == 0

"""Repair of a QED image: what ``qemu-img check -r`` does, and leaked clusters given back.

Entries that point to where nothing can be are dropped. That is all that can be done about them: nothing was ever
read from there, and the format counts no references. Leaks are given back by compaction.

An L2 table whose clusters have another user stays as it is: it may be data that a wrong L1 entry takes for a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowfs.block.check import CheckResult, Repair
from cowfs.formats.qed.check import Entries, Scan, are_inside, check, entries_of, scan
from cowfs.formats.qed.layout import ZERO_CLUSTER
from cowfs.formats.qed.space import Space

if TYPE_CHECKING:
    import numpy as np

    from cowfs.formats.qed.image import QedImage
else:
    from cowfs.lazy import np


async def check_and_repair(image: QedImage, how: Repair) -> CheckResult:
    """Put right what ``how`` says, and check again; nothing else is under way on the image.

    The need-check bit is on disk before the first change, and taken off when nothing is wrong any more.
    """
    done = CheckResult()
    image.space = Space(image.storage.length >> image.cluster_bits)
    found = await scan(image, image.space.end)
    if found.result.corruptions and how is Repair.ALL:
        await image.mark()
        await drop_wrong_entries(image, done)
        found = await scan(image, image.space.end)
    if not found.result.corruptions:
        await _give_back(image, found, done)
    return (await check(image)).after(done)


async def drop_wrong_entries(image: QedImage, done: CheckResult) -> None:
    """Drop all entries that point to where nothing can be, durably; the need-check bit is on disk."""
    end = image.space.end
    entries = entries_of(image.l1.entries)
    present = np.flatnonzero(entries)
    inside = are_inside(image, entries[present], image.header.table_size, end)
    for index in present[~inside].tolist():
        done.fixed(f"L1 entry {image.l1.entries[index]:#x}", corruptions=1)
        image.l1.set(index, 0)
    shared = await _shared_tables(image, entries[present[inside]], end)
    for index in present[inside].tolist():
        offset = image.l1.entries[index]
        if offset in shared:
            continue
        table = await image.peek_table(offset)
        wrong = np.flatnonzero((table > ZERO_CLUSTER) & ~are_inside(image, table, 1, end)).tolist()
        if wrong:
            done.fixed(f"{len(wrong)} entries of the L2 table at {offset:#x}", corruptions=len(wrong))
            loaded = await image.load_table(offset)
            for entry in wrong:
                loaded.set(entry, 0)
            await image.tables.relieve()
    await image.tables.flush()


async def _shared_tables(image: QedImage, offsets: Entries, end: int) -> set[int]:
    """Offsets of those L2 tables of which something else refers to a cluster: L1, another table, an entry for data."""
    bits, size = image.cluster_bits, image.header.table_size
    places = (offsets >> np.uint64(bits)).astype(np.int64)[:, np.newaxis] + np.arange(size)
    clusters, users = np.unique(places, return_counts=True)
    first = image.l1.offset >> bits
    shared = (users > 1) | (clusters >= first) & (clusters < first + size)
    for offset in offsets.tolist():
        table = await image.peek_table(offset)
        data = table[are_inside(image, table, 1, end)] >> np.uint64(bits)
        shared |= np.isin(clusters, data.astype(np.int64))
    return set(offsets[np.isin(places, clusters[shared]).any(axis=1)].tolist())


async def _give_back(image: QedImage, found: Scan, done: CheckResult) -> None:
    """Leave no free clusters, and no need-check bit."""
    leaks = found.used.count_free()
    image.adopt(found)
    if leaks:
        done.fixed(f"{leaks} clusters, which nothing refers to", leaks=leaks)
        await image.compact()
    await image.settle()

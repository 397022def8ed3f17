"""Memory of an open image: random reads and writes all over a disk whose tables are far larger than the bound on them.

All L2 tables exist, as holes in the host's file. What has to stay the same is what a disk takes beyond its bound,
whatever its tables would take together.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trio
from peers import check, machine, run

from cowfs.formats.chain import Opening, open_disk

#: bytes
CLUSTER = 65536
TIB = 1 << 40
MIB = 1 << 20
COPIED = 1 << 63
SEED = 1


class Case(NamedTuple):
    """An image and a bound in MiB; ``table`` is the bytes of one of its L2 tables."""

    format: str
    bound: int
    table: int
    make: Callable[[Path, int], None]


def qcow2(path: Path, size: int) -> None:
    """Make an image with all of its L2 tables; what they need is counted."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, str(size))
    with path.open("r+b") as file:
        number = file.fileno()
        header = np.frombuffer(os.pread(number, 56, 0), ">u8").astype(np.uint64).tolist()
        l1, counts = header[5], header[6]
        tables = size // (CLUSTER * CLUSTER // 8)
        # QEMU puts L1 last
        first = l1 // CLUSTER - (-tables * 8 // CLUSTER)
        per_block = CLUSTER // 2
        blocks = -(-(first + tables) // per_block) + 1
        end = first + tables + blocks
        places = np.arange(first + tables, end, dtype=np.uint64) * CLUSTER
        places[0] = int.from_bytes(os.pread(number, 8, counts), "big")
        used = np.zeros(blocks * per_block, ">u2")
        used[: first + tables + blocks] = 1
        # the first block has a place already
        used[first + tables] = 0
        for place, block in zip(places.tolist(), used.reshape(blocks, -1), strict=True):
            os.pwrite(number, block.tobytes(), place)
        os.pwrite(number, places.astype(">u8").tobytes(), counts)
        entries = np.arange(first, first + tables, dtype=np.uint64) * CLUSTER | np.uint64(COPIED)
        os.pwrite(number, entries.astype(">u8").tobytes(), l1)
        file.truncate(end * CLUSTER)
    check(path, "qcow2")


def qed(path: Path, size: int) -> None:
    """Make an image with all of its L2 tables, of the largest kind."""
    options = f"cluster_size={CLUSTER},table_size=16"
    run("qemu-img", "create", "-q", "-f", "qed", "-o", options, path, str(size))
    table = 16 * CLUSTER
    first = CLUSTER + table
    tables = size // (table // 8 * CLUSTER)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), (np.arange(tables, dtype="<u8") * table + first).tobytes(), CLUSTER)
        file.truncate(first + tables * table)
    check(path, "qed")


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


async def work(path: Path, case: Case, reads: int, writes: int) -> list[float]:
    """Resident memory when the image is open, after reads, after writes, after a flush; then most of tables."""
    rnd = random.Random(SEED)
    disk = await open_disk(str(path), case.format, writable=True, opening=Opening(case.bound * MIB))
    figures = [resident()]
    for _ in range(reads):
        await disk.read(rnd.randrange(disk.size // 4096) * 4096, 4096)
    figures.append(resident())
    written = {}
    for number in range(writes):
        offset = rnd.randrange(disk.size // 4096) * 4096
        written[offset] = number % 255 + 1
        await disk.write(offset, bytes([written[offset]]) * 4096)
    figures.append(resident())
    await disk.flush()
    figures.append(resident())
    for offset, byte in written.items():
        if await disk.read(offset, 4096) != bytes([byte]) * 4096:
            sys.exit(f"bench: wrong content at {offset}")
    await disk.close()
    return figures


def measure(path: Path, case: Case, reads: int, writes: int, result: Connection) -> None:
    """Do the work in a process of its own."""
    result.send(trio.run(work, path, case, reads, writes))


CASES = [
    Case("qcow2", 4, CLUSTER, qcow2),
    Case("qcow2", 32, CLUSTER, qcow2),
    Case("qcow2", 128, CLUSTER, qcow2),
    Case("qed", 32, 16 * CLUSTER, qed),
]


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--size", type=int, default=16, help="TiB of the disk")
    parser.add_argument("--reads", type=int, default=200_000, help="random reads of 4 KiB")
    parser.add_argument("--writes", type=int, default=20_000, help="random writes of 4 KiB")
    parser.add_argument("--folder", help="where the images lie; needs sparse files of that size")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cowfs-bench.", dir=options.folder))
    print("(MiB)" + "".join(f"{word:>10}" for word in ("tables", "bound", "at start", "reads", "writes", "flush")))
    results = []
    context = multiprocessing.get_context("spawn")
    try:
        for case in CASES:
            path = folder / "image"
            case.make(path, options.size * TIB)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(path, case, options.reads, options.writes, sender))
            process.start()
            sender.close()
            figures = receiver.recv()
            process.join()
            check(path, case.format)
            path.unlink()
            tables = options.size * TIB // CLUSTER * 8 // MIB
            columns = [tables, case.bound, *figures]
            print(f"{case.format:5}" + "".join(f"{column:10.0f}" for column in columns), flush=True)
            results.append({"format": case.format, "tables": tables, "bound": case.bound, "resident": figures})
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "memory": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

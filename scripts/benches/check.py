"""Checks and repairs of large images: time and memory of ``cowfs check`` beside ``qemu-img check``.

Every cluster of the guest's disk is allocated; the clusters themselves are holes, so that an image of 1 TiB takes
some hundred megabytes. In the cases "scattered" the host's clusters are in random order, which is the worst there is.
Each figure is that of a process of its own: wall time, and the most memory that it had at once.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from peers import machine, run

#: bytes
CLUSTER = 65536
GIB = 1 << 30
#: bits of an entry that are a host offset
MASK = np.uint64(0x00FF_FFFF_FFFF_FE00)
SEED = 1
#: exit code for leaked clusters
LEAKS = 3


#: what makes an image; it is given the path and the bytes of the disk
Make = Callable[[Path, int], None]


class Figures(NamedTuple):
    """Of one process: seconds, and MiB; not ``finished`` if it was stopped, for taking too long."""

    seconds: float
    memory: float
    finished: bool


class Case(NamedTuple):
    """A kind of image; ``repair`` goes to ``-r``."""

    name: str
    format: str
    make: Make
    repair: str = ""


def qcow2(
    *options: str, scattered: bool = True, snapshots: int = 0, wreck: bool = False
) -> Callable[[Path, int], None]:
    """Return what makes a qcow2 image by QEMU, with data clusters in random order if ``scattered``."""

    def make(path: Path, size: int) -> None:
        wanted = ",".join((f"cluster_size={CLUSTER}", "preallocation=metadata", *options))
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", wanted, path, str(size))
        # these share their tables with the disk: what happens to one happens to all
        for number in range(snapshots):
            run("qemu-img", "snapshot", "-c", str(number), path)
        if scattered:
            scatter(path, words=2 if "extended_l2=on" in options else 1)
        if wreck:
            with path.open("r+b") as file:
                offset, clusters = integer(file.fileno(), 48, 8), integer(file.fileno(), 56, 4)
                os.pwrite(file.fileno(), bytes(clusters * CLUSTER), offset)

    return make


def integer(file: int, offset: int, size: int) -> int:
    """Read a header field."""
    return int.from_bytes(os.pread(file, size, offset), "big")


def scatter(path: Path, *, words: int) -> None:
    """Give every guest cluster another place, at random; the image stays sound."""
    with path.open("r+b") as file:
        number = file.fileno()
        l1 = np.frombuffer(os.pread(number, 8 * integer(number, 36, 4), integer(number, 40, 8)), ">u8")
        places = [int(entry & MASK) for entry in l1.astype(np.uint64) if entry]
        tables = np.concatenate([np.frombuffer(os.pread(number, CLUSTER, place), np.uint64) for place in places])
        # entries that are not in use stay behind at the end
        used = np.flatnonzero(tables[::words])
        assert len(used) == used[-1] + 1, "all of the disk is allocated"
        np.random.default_rng(SEED).shuffle(tables[::words][: len(used)])
        for place, table in zip(places, tables.reshape(-1, CLUSTER // 8), strict=True):
            os.pwrite(number, table.tobytes(), place)


def qed(*, scattered: bool) -> Make:
    """Return what makes a QED image; QEMU cannot allocate all of one."""

    def make(path: Path, size: int) -> None:
        run("qemu-img", "create", "-q", "-f", "qed", "-o", f"cluster_size={CLUSTER},table_size=4", path, str(size))
        table_bytes = 4 * CLUSTER
        clusters = size // CLUSTER
        tables = -(-clusters * 8 // table_bytes)
        start = CLUSTER + table_bytes
        first = start + tables * table_bytes
        data = np.zeros(tables * table_bytes // 8, "<u8")
        data[:clusters] = shuffled(clusters, scattered=scattered) * CLUSTER + first
        with path.open("r+b") as file:
            l1 = np.arange(tables, dtype="<u8") * table_bytes + start
            os.pwrite(file.fileno(), l1.tobytes(), CLUSTER)
            os.pwrite(file.fileno(), data.tobytes(), start)
            file.truncate(first + clusters * CLUSTER)

    return make


def shuffled(count: int, *, scattered: bool) -> npt.NDArray[np.uint64]:
    """Numbers from 0, in random order if ``scattered``."""
    numbers = np.arange(count, dtype=np.uint64)
    if scattered:
        np.random.default_rng(SEED).shuffle(numbers)
    return numbers


CHECKS = [
    Case("qcow2, in order", "qcow2", qcow2(scattered=False)),
    Case("qcow2, scattered", "qcow2", qcow2()),
    Case("qcow2, scattered, 4 snapshots", "qcow2", qcow2(snapshots=4)),
    Case("qcow2, scattered, 1-bit counts", "qcow2", qcow2("refcount_bits=1")),
    Case("qcow2, scattered, 64-bit counts", "qcow2", qcow2("refcount_bits=64")),
    Case("qcow2, scattered, extended L2", "qcow2", qcow2("extended_l2=on")),
    Case("qed, in order", "qed", qed(scattered=False)),
    Case("qed, scattered", "qed", qed(scattered=True)),
]
REPAIRS = [
    Case("qcow2, refcount table lost", "qcow2", qcow2(scattered=False, wreck=True), "all"),
    Case("the same, scattered", "qcow2", qcow2(wreck=True), "all"),
    Case("the same, 1-bit counts", "qcow2", qcow2("refcount_bits=1", wreck=True), "all"),
    Case("the same, 64-bit counts", "qcow2", qcow2("refcount_bits=64", wreck=True), "all"),
]


def measure(tool: str | Path, case: Case, image: Path, patience: float) -> Figures:
    """Run one check or repair, for ``patience`` seconds at most; what it ends with must be a sound image."""
    words = [str(tool), "check", "-f", case.format, *(["-r", case.repair] if case.repair else []), str(image)]
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        timer = threading.Timer(patience, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        finished = process.returncode != -signal.SIGKILL
        # qemu-img 7.2 takes data of QED images for leaked that lies at multiples of 4 GiB
        sound = (0, LEAKS) if tool == "qemu-img" and case.format == "qed" else (0,)
        if finished and process.returncode not in sound:
            output.seek(0)
            text = output.read()[-1000:].decode(errors="replace")
            sys.exit(f"bench: {' '.join(words)} returned {process.returncode}: {text}")
    return Figures(seconds, usage.ru_maxrss / 1024, finished)


def compare(case: Case, size: int, folder: Path, patience: float) -> dict[str, Figures]:
    """Figures of both tools on an image made for them; one made anew for each if it is to be repaired."""
    image = folder / f"image.{case.format}"
    found = {}
    for name, tool in (("cowfs", Path(sys.executable).with_name("cowfs")), ("qemu", "qemu-img")):
        if case.repair or not image.exists():
            # in another process: what this one has in memory would count as the tool's, which begins as a copy of it
            maker = multiprocessing.get_context("fork").Process(target=case.make, args=(image, size))
            maker.start()
            maker.join()
            if maker.exitcode:
                sys.exit(1)
        found[name] = measure(tool, case, image, patience)
        if case.repair and found[name].finished:
            run("qemu-img", "check", "-q", "-f", case.format, image)
    image.unlink()
    return found


def duration(figures: Figures) -> str:
    """Seconds in words."""
    return f"{figures.seconds:.2f}" if figures.finished else f">{figures.seconds:.0f}"


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench check", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="GiB of the disks that are checked")
    parser.add_argument("--repair-size", type=int, default=100, help="GiB of the disks that are repaired")
    parser.add_argument("--patience", type=float, default=60, help="seconds after which a tool is stopped")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--folder", help="where the images lie; needs sparse files of that size")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cowfs-bench.", dir=options.folder))
    results = []
    print(f"{'':34}{'seconds':^24}{'MiB at most':^24}")
    print(f"{'case':34}" + 2 * f"{'cowfs':>8}{'qemu':>8}{'ratio':>8}")
    try:
        for case, size in [*((c, options.size) for c in CHECKS), *((c, options.repair_size) for c in REPAIRS)]:
            if options.only not in case.name:
                continue
            ours, theirs = (found := compare(case, size * GIB, folder, options.patience)).values()
            seconds, memory = ours.seconds / theirs.seconds, ours.memory / theirs.memory
            print(
                f"{case.name:34}{duration(ours):>8}{duration(theirs):>8}{seconds:8.2f}"
                f"{ours.memory:8.0f}{theirs.memory:8.0f}{memory:8.2f}",
                flush=True,
            )
            figures = {tool: figure._asdict() for tool, figure in found.items()}
            results.append({"case": case.name, "size": size * GIB, **figures, "ratio": {"seconds": seconds}})
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "check": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

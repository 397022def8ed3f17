"""Streaming: what guests feel of it, and how fast it is while there are none; beside QEMU's FUSE export.

Busy: fio at random, 4 KiB, reads or half of them writes, without and with a stream at work; the ratios are those of the
two runs, one right after the other. "own" is a guest that works on what the overlay holds already, "all" one that works
all over the disk, so that its reads fetch clusters from below, too. QEMU cannot stream below a FUSE export that is
writable; with writes, its export shows what another of its daemons serves (streamers.py).

Idle: bytes a second of a stream, until what it wrote is durable, beside ``cp --sparse=never`` and fsync of the same
file in the same folder. That is what cp does at its best: it copies in the kernel (copy_file_range).

Rounds of the peers take turns; what counts are medians of the ratios within a round.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers import check, machine, run
from streamers import CowfsStream, QemuStream, Streamer, fio_latencies, remove, streamed, sync

DEPTHS = (1, 8)
AREAS = ("own", "all")
WORK = {"reads": "randread", "mixed": "randrw"}
MIB = 1 << 20


@contextmanager
def scratch(where: str) -> Iterator[Path]:
    """Yield a new folder, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="cowfs-bench.", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def make_base(folder: Path, size: int) -> Path:
    """A raw file of so many MiB without a zero."""
    base = folder / "base.raw"
    with base.open("wb") as file, Path("/dev/urandom").open("rb") as random:
        for _ in range(size):
            file.write(random.read(MIB))
        os.fsync(file.fileno())
    return base


def make_overlay(base: Path, own: int = 0) -> Path:
    """An overlay that holds the first so many MiB."""
    image = base.parent / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
    for start in range(0, own, 64):
        run("qemu-io", "-f", "qcow2", "-c", f"write -q {start}M {min(64, own - start)}M", image)
    return image


def busy(peer: Streamer, base: Path, area: str, work: str, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one guest, without and with a stream."""
    image = make_overlay(base, options.own)
    job = [f"--rw={WORK[work]}", "--bs=4k", f"--iodepth={depth}", "--time_based", f"--runtime={options.seconds}"]
    job.append(f"--size={options.own if area == 'own' else options.size}M")
    with peer.serving(image, "qcow2", base.parent) as flat:
        without = fio_latencies(flat, *job)
        peer.start_stream()
        begun, start = peer.streamed() or 0, time.monotonic()
        found = fio_latencies(flat, *job)
        reached, elapsed = peer.streamed(), time.monotonic() - start
    check(image, "qcow2")
    remove(image)
    return {
        "without": without._asdict(),
        "with": found._asdict(),
        "p50": found.p50 / without.p50,
        "p99": found.p99 / without.p99,
        "iops": found.iops / without.iops,
        # of a stream that ended before the guest did, the ratios tell too little
        "ended": reached is None,
        "rate": None if reached is None else (reached - begun) / elapsed,
    }


def copy(base: Path) -> float:
    """Bytes a second of cp."""
    target = base.parent / "copy.raw"
    start = time.monotonic()
    run("cp", "--sparse=never", base, target)
    sync(target)
    elapsed = time.monotonic() - start
    target.unlink()
    return base.stat().st_size / elapsed


def run_busy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases with guests; prints a table."""
    print(f"busy: with a stream / without{'cowfs':^34}  {'qemu':^34}")
    columns = f"{'p50':>10}{'p99':>8}{'iops':>8}{'MB/s':>8}"
    print(f"{'area':6}{'work':8}{'depth':>6}{columns}{columns}   (MB/s of the stream)")
    results = []
    with scratch(options.folder[0]) as folder:
        base = make_base(folder, options.size)
        for area, work, depth in itertools.product(options.areas, WORK, DEPTHS):
            peers: list[Streamer] = [CowfsStream(), QemuStream(writes=work == "mixed")]
            rounds = [
                {peer.name: busy(peer, base, area, work, depth, options) for peer in peers}
                for _ in range(options.rounds)
            ]
            median: dict[str, dict[str, float]] = {}
            line = f"{area:6}{work:8}{depth:6}"
            for peer in peers:
                found = [figures[peer.name] for figures in rounds]
                median[peer.name] = {key: statistics.median(f[key] for f in found) for key in ("p50", "p99", "iops")}
                rates = [f["rate"] / 1e6 for f in found if not f["ended"]]
                line += "  " + "".join(f"{ratio:8.2f}" for ratio in median[peer.name].values())
                line += f"{statistics.median(rates):8.0f}" if len(rates) == len(found) else f"{'ended':>8}"
            print(line, flush=True)
            results.append({"area": area, "work": work, "depth": depth, "rounds": rounds, "median": median})
    return results


def run_idle(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All file systems without guests; prints a table."""
    print(f"\nidle{'':28}{'MB/s':^24}  cowfs /")
    print(f"{'folder':24}" + "".join(f"{name:>10}" for name in ("cowfs", "qemu", "cp")) + f"{'cp':>8}{'qemu':>8}")
    results = []
    peers: list[Streamer] = [CowfsStream(), QemuStream(writes=False)]
    for where in options.folder:
        with scratch(where) as folder:
            base = make_base(folder, options.idle_size)
            rounds = [
                {**{peer.name: streamed(peer, make_overlay(base), base) for peer in peers}, "cp": copy(base)}
                for _ in range(options.rounds)
            ]
        names = [*(peer.name for peer in peers), "cp"]
        median = {name: statistics.median(found[name] for found in rounds) for name in names}
        ratio = {name: statistics.median(found["cowfs"] / found[name] for found in rounds) for name in names}
        figures = "".join(f"{median[name] / 1e6:10.0f}" for name in names)
        print(f"{where:24}{figures}{ratio['cp']:8.2f}{ratio['qemu']:8.2f}", flush=True)
        results.append({"folder": where, "rounds": rounds, "median": median, "ratio": ratio})
    return results


def main() -> None:
    """Run, print tables, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench jobs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each run of fio")
    parser.add_argument("--size", type=int, default=4096, help="MiB of the disk with guests")
    parser.add_argument("--own", type=int, default=256, help="MiB of it that the overlay holds from the start")
    parser.add_argument("--idle-size", type=int, default=1024, help="MiB of the disk without guests")
    parser.add_argument("--areas", choices=AREAS, nargs="*", default=AREAS, help="where guests work")
    parser.add_argument(
        "--folder",
        nargs="*",
        default=["/dev/shm", tempfile.gettempdir()],
        help="where images lie; guests use the first",
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if options.areas:
        results["busy"] = run_busy(options)
    results["idle"] = run_idle(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Allocating writes: random 4 KiB writes into an empty overlay over a full base, beside QEMU's FUSE export.

Everything lies in memory (tmpfs). Each run starts from a new overlay and makes half as many writes as the disk has
clusters of 64 KiB, so that most of them allocate, and copy the rest of their cluster. What cowfs puts off until a flush
shows in the runs that end with an fsync, whose time counts as the writes'. Rounds of the peers take turns; what counts
is the median of the ratios within a round.
"""

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from peers import Cowfs, Peer, QemuExport, check, fio, machine, run

DEPTHS = (1, 8, 32)
FORMATS = ("qcow2", "qed")
ENDINGS = ("none", "fsync")
#: bytes; what both formats have unless told otherwise
CLUSTER = 65536


def measure(peer: Peer, base: Path, format: str, depth: int, ending: str) -> float:
    """Writes a second of one run, and of its fsync if it ends with one."""
    folder = base.parent
    image = folder / f"overlay.{format}"
    run("qemu-img", "create", "-q", "-f", format, "-b", base, "-F", "raw", image)
    with peer.serving(image, format, folder) as flat:
        writes = base.stat().st_size // CLUSTER // 2
        job = ["--rw=randwrite", "--bs=4k", f"--iodepth={depth}", f"--io_size={writes * 4096}"]
        iops = fio(flat, *job, f"--end_fsync={int(ending == 'fsync')}")
    check(image, format)
    image.unlink()
    return iops


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench allocate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=2048, help="MiB of the disk")
    parser.add_argument("--folder", default="/dev/shm", help="where the images lie")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cowfs-bench.", dir=options.folder))
    results = []
    try:
        base = folder / "base.raw"
        with base.open("wb") as file, Path("/dev/urandom").open("rb") as random:
            for _ in range(options.size):
                file.write(random.read(1 << 20))
        peers: list[Peer] = [Cowfs(), QemuExport()]
        print(f"{'format':8}{'ending':8}{'depth':>6}{'cowfs':>12}{'qemu':>12}{'ratio':>8}   (writes a second; medians)")
        for format, ending, depth in itertools.product(FORMATS, ENDINGS, DEPTHS):
            rounds = [
                {peer.name: measure(peer, base, format, depth, ending) for peer in peers} for _ in range(options.rounds)
            ]
            median = {peer.name: statistics.median(found[peer.name] for found in rounds) for peer in peers}
            ratio = statistics.median(found["cowfs"] / found["qemu"] for found in rounds)
            case = {"format": format, "ending": ending, "depth": depth}
            results.append({**case, "rounds": rounds, "median": median, "ratio": ratio})
            line = f"{format:8}{ending:8}{depth:6}{median['cowfs']:12.0f}{median['qemu']:12.0f}{ratio:8.2f}"
            print(line, flush=True)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "allocate": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

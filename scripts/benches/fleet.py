"""Many clones of one golden image in one mount: what each of them costs, and whether they slow each other down.

Every clone is a new qcow2 overlay on the same base. What that holds lies all over the disk, and so does what is read
and written of each clone. Memory is the server's PSS; what a chain takes is how it rises from one chain to all. Idle is
the server's processor time while nobody asks for anything. Speed is that of random requests of 4 KiB on one disk: alone
in its mount, among the others, and with streams on four of those.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers import fio, machine, run

MIB = 1 << 20
#: streams that run beside the disk that is measured
JOBS = 4
#: bytes a second of each of them
JOB_SPEED = 10 * MIB
#: seconds after which disks that nobody uses have given back what they can
SETTLING = 65
COWFS = Path(sys.executable).with_name("cowfs")


class Server:
    """A mount with some clones in it."""

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self.point = folder / "mount"
        self.point.mkdir(exist_ok=True)
        start = time.perf_counter()
        run(COWFS, "mount", *images, self.point)
        self.seconds = time.perf_counter() - start
        self._pid = json.loads((self.point / ".cowfs" / "status.json").read_text())["pid"]

    def command(self, text: str, file: str = "control") -> float:
        """Write a command; milliseconds until it is obeyed."""
        start = time.perf_counter()
        (self.point / ".cowfs" / file).write_text(text)
        return 1000 * (time.perf_counter() - start)

    def memory(self) -> float:
        """KiB of memory that are the server's."""
        match = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{self._pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1])

    def descriptors(self) -> int:
        """Files that the server has open."""
        return len(list(Path(f"/proc/{self._pid}/fd").iterdir()))

    def processor(self) -> float:
        """Seconds of processor time that the server has had."""
        # as clock_getcpuclockid(3) makes it
        return time.clock_gettime(~self._pid << 3 | 2)

    def idle(self, seconds: float) -> float:
        """Milliseconds of processor time that a minute takes in which nothing is asked."""
        before = self.processor()
        time.sleep(seconds)
        return (self.processor() - before) * 60_000 / seconds

    def umount(self) -> float:
        """Unmount; seconds until the server has gone."""
        start = time.perf_counter()
        run(COWFS, "umount", self.point)
        return time.perf_counter() - start


@contextmanager
def serving(folder: Path, images: Sequence[Path]) -> Iterator[Server]:
    """Mount, and see that nothing stays mounted."""
    server = Server(folder, images)
    try:
        yield server
    finally:
        subprocess.run(["umount", "-l", str(server.point)], capture_output=True, check=False)


def clones(folder: Path, base: Path, count: int, format: str, name: str) -> list[Path]:
    """Make new overlays on the base, of the same kind as ``qemu-img`` makes, which needs longer for it."""
    first = folder / f"{name}0.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", format, first)
    made = [folder / f"{name}{number}.qcow2" for number in range(count)]
    for path in made[1:]:
        shutil.copyfile(first, path)
    return made


def speeds(flat: Path, seconds: int, *, depth: int) -> dict[str, float]:
    """Random reads and writes a second of 4 KiB, on what has been read and written before."""
    job = [f"--runtime={seconds}", "--time_based", "--bs=4k", "--size=32m", f"--iodepth={depth}"]
    return {rw: fio(flat, f"--rw={rw}", *job) for rw in ("randread", "randwrite")}


def use(server: Server, images: Sequence[Path], mebibytes: int) -> None:
    """Read and write some of every disk: random pieces of 64 KiB, each of one cluster."""
    chooser = random.Random(1)
    for image in images:
        with (server.point / image.stem).open("r+b", buffering=0) as file:
            clusters = chooser.sample(range(file.seek(0, os.SEEK_END) >> 16), mebibytes << 4)
            for number, cluster in enumerate(clusters):
                if number % 2:
                    os.pwrite(file.fileno(), bytes([number % 255 + 1]) * 65536, cluster << 16)
                else:
                    os.pread(file.fileno(), 65536, cluster << 16)


def percentile(values: Sequence[float], part: float) -> float:
    """Of sorted values the one below which this part of them lies."""
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


def measure(folder: Path, base: Path, format: str, options: argparse.Namespace) -> dict[str, float]:
    """All figures of one mount with one clone, and one with all."""
    images = clones(folder, base, options.count, format, "clone")
    more = clones(folder, base, options.adds, format, "more")
    found: dict[str, float] = {}
    memory: dict[str, list[float]] = {}
    speed: dict[str, dict[str, float]] = {}
    for count in (1, options.count):
        with serving(folder, images[:count]) as server:
            found[f"mount {count}, s"] = server.seconds
            memory[str(count)] = [server.memory()]
            found[f"descriptors, {count}"] = server.descriptors()
            found[f"idle {count}, ms of processor a minute"] = server.idle(options.idle)
            if count > 1:
                found |= churn(server, more)
            use(server, images[:count], options.used)
            # what was copied on read is on disk as well then
            for image in images[:count]:
                with (server.point / image.stem).open("r+b") as file:
                    os.fsync(file.fileno())
            memory[str(count)].append(server.memory())
            time.sleep(SETTLING)
            memory[str(count)].append(server.memory())
            found[f"idle {count} after use, ms of processor a minute"] = server.idle(options.idle)
            flat = server.point / images[0].stem
            fio(flat, "--rw=write", "--bs=1m", "--size=32m")
            for depth in options.depths:
                speed[f"{count}, depth {depth}"] = speeds(flat, options.seconds, depth=depth)
            if count > JOBS:
                for image in images[-JOBS:]:
                    server.command(f"start speed={JOB_SPEED}", f"{image.stem}/stream")
                for depth in options.depths:
                    speed[f"{count} with {JOBS} streams, depth {depth}"] = speeds(flat, options.seconds, depth=depth)
            found[f"umount {count}, s"] = server.umount()
    found["memory 1, KiB"] = memory["1"][0]
    for what, one, all in zip(("", " in use", " used, idle"), *memory.values(), strict=True):
        found[f"memory a chain{what}, KiB"] = (all - one) / (options.count - 1)
    found["mount a chain, ms"] = 1000 * (found[f"mount {options.count}, s"] - found["mount 1, s"]) / (options.count - 1)
    for name, figures in speed.items():
        found |= {f"{rw} of {name}, a second": figure for rw, figure in figures.items()}
    for image in (*images, *more):
        image.unlink()
    return found


def churn(server: Server, images: Sequence[Path]) -> dict[str, float]:
    """Add images one by one and take them out again."""
    added = [server.command(f"add {image}") for image in images]
    removed = [server.command(f"remove {image.stem}") for image in images]
    return {
        "add, ms": statistics.median(added),
        "add at worst of 100, ms": percentile(added, 0.99),
        "remove, ms": statistics.median(removed),
    }


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench fleet", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="clones in the mount")
    parser.add_argument("--adds", type=int, default=100, help="clones that are added and removed besides")
    parser.add_argument("--size", type=int, default=10240, help="MiB of the disk")
    parser.add_argument("--filled", type=int, default=256, help="MiB of the golden image that are not zeros")
    parser.add_argument("--used", type=int, default=4, help="MiB that are read and written of each")
    parser.add_argument("--idle", type=float, default=30, help="seconds for which nothing is asked")
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement of speed")
    parser.add_argument("--depths", type=int, nargs="*", default=[1, 16], help="requests at a time")
    parser.add_argument("--formats", nargs="*", default=["raw", "qcow2"], help="of the golden image")
    parser.add_argument("--folder", default="/dev/shm", help="where the images lie")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cowfs-bench.", dir=options.folder))
    results = {}
    try:
        for format in options.formats:
            base = golden(folder, format, options.size, options.filled)
            results[format] = measure(folder, base, format, options)
            print(f"golden image: {format}, {options.size} MiB; {options.count} clones")
            for name, figure in results[format].items():
                print(f"    {name:48}{figure:12.{1 if figure < 1000 else 0}f}", flush=True)
            base.unlink()
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "fleet": results}, indent=2) + "\n")


def golden(folder: Path, format: str, size: int, filled: int) -> Path:
    """Make the base: a MiB here and there that is not zeros."""
    raw = folder / "golden.raw"
    with raw.open("wb") as file, Path("/dev/urandom").open("rb") as source:
        file.truncate(size * MIB)
        for number in range(filled):
            file.seek(size * number // filled * MIB)
            file.write(source.read(MIB))
    if format == "raw":
        return raw
    path = folder / f"golden.{format}"
    run("qemu-img", "convert", "-f", "raw", "-O", format, raw, path)
    raw.unlink()
    return path


if __name__ == "__main__":
    main()

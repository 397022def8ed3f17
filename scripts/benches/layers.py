"""Where the time of a request of 4 KiB goes, in microseconds of the server's processor, from the storage upwards.

By subtraction. In one process, without FUSE, the same random requests are made of the storage, the format's table, the
disk, and the handler. Mounts show the rest: one whose handlers do nothing has what FUSE, pyfuse3 and the loop cost; the
C passthrough is what FUSE costs at the least. Processor time is what counts, since it does not depend on who
else is using the machine; "wall" is the time from one answer to the next, with everything.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import trio
from exports import Floor, await_file, serving_processes
from peers import PATIENCE, Cowfs, Peer, fio, machine, run
from suites import scratch
from workloads import MIB, Context, convert, make_chain, make_content

from cowfs.fuse.images import Mount, Source
from cowfs.fuse.operations import Operations
from cowfs.fuse.options import Settings
from cowfs.fuse.tree import ROOT_INODE

BLOCK = 4096
SEED = 1
#: calls in one measurement of a layer
CALLS = 20_000
DEPTHS = (1, 32)
TICK = os.sysconf("SC_CLK_TCK")

Call = Callable[[int], object]


class Used(NamedTuple):
    """Of one request at a mount: microseconds of the server in user and kernel mode, and on the clock."""

    user: float
    system: float
    wall: float


class Nothing(Peer):
    """The mount whose handlers do nothing."""

    name = "nothing"

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Show a file of the size of the image."""
        point = folder / "nothing"
        point.mkdir(exist_ok=True)
        program = Path(__file__).with_name("nothing.py")
        self._process = subprocess.Popen([sys.executable, program, str(point), str(image.stat().st_size), str(image)])
        await_file(point / "disk", self._process)
        return point / "disk"

    def stop(self, folder: Path) -> None:
        """Unmounting ends it."""
        run("fusermount3", "-u", folder / "nothing")
        self._process.wait(timeout=PATIENCE)


def clocked(call: Call, offsets: Iterable[int]) -> float:
    """Return microseconds of this thread for one call, without those of the loop around it: the least of five."""
    offsets = list(offsets)
    best = []
    for function in (call, lambda offset: None):
        taken = []
        for _ in range(5):
            start = time.thread_time_ns()
            for offset in offsets:
                function(offset)
            taken.append(time.thread_time_ns() - start)
        best.append(min(taken))
    return (best[0] - best[1]) / len(offsets) / 1000


def answered(handler: Callable[..., Any]) -> Callable[..., None]:
    """Make a plain call of a handler; it must answer without suspending."""

    def call(*arguments: object) -> None:
        try:
            handler(*arguments).send(None)
        except StopIteration:
            return
        raise AssertionError("the handler has suspended: this is not the hot path")

    return call


def sure(function: Callable[..., bool]) -> Callable[..., None]:
    """Make a call that must not decline."""

    def call(*arguments: object) -> None:
        if not function(*arguments):
            raise AssertionError("declined: this is not the hot path")

    return call


async def inside(image: Path, *, writes: bool) -> dict[str, float]:
    """Microseconds of one request, as far as it is made of what is here; each figure holds those before it."""
    rnd = random.Random(SEED)
    mount = Mount("/nowhere", Settings(copy_on_read=False))
    async with trio.open_nursery() as nursery:
        await mount.add(Source(str(image), "disk", "qcow2" if image.suffix == ".qcow2" else "qed"))
        await mount.start(nursery)
        operations, disk = Operations(mount), mount.images["disk"].disk
        node = operations.tree.find(ROOT_INODE, "disk")
        opened = await operations.open(node.inode, os.O_RDWR, None)
        offsets = [rnd.randrange(disk.size // BLOCK) * BLOCK for _ in range(CALLS)]
        view, data = memoryview(bytearray(BLOCK)), bytes(BLOCK)
        # all tables into memory, and the image is told that it is being written to
        for offset in offsets:
            await disk.readinto(offset, view)
        if writes:
            await disk.write(offsets[0], bytes(await disk.read(offsets[0], BLOCK)))
        pieces = {offset: (await disk.resolve(offset, BLOCK))[0] for offset in offsets}
        places = {offset: (disk.layers[p.depth].data_storage, p.extent.host_offset) for offset, p in pieces.items()}
        store, one, whole, handler = sure(_io(writes)), _table(disk), sure(disk.readinto_now), answered(operations.read)
        figures = {
            "storage": clocked(lambda offset: store(*places[offset], data if writes else view), offsets),
            "format": clocked(one, offsets),
        }
        if writes:
            whole, handler = sure(disk.write_now), answered(operations.write)
        figures["disk"] = clocked(lambda offset: whole(offset, data if writes else view), offsets)
        figures["handler"] = clocked(lambda offset: handler(opened.fh, offset, data if writes else BLOCK), offsets)
        await operations.release(opened.fh)
        await mount.close()
        nursery.cancel_scope.cancel()
    return figures


def _io(writes: bool) -> Callable[..., bool]:
    if writes:
        return lambda storage, place, data: storage.write_now(place, (data,))
    return lambda storage, place, view: storage.read_now(place, (view,))


def _table(disk: Any) -> Call:
    """Return what asks the tables of all layers down to the one that has the data."""
    if len(disk.layers) == 1:
        return lambda offset: disk.layers[0].map_now(offset, BLOCK)
    return lambda offset: disk.resolve_now(disk.layers, 0, offset, BLOCK)


def used_by(processes: list[int]) -> tuple[float, float]:
    """Return seconds of processes so far, in user and in kernel mode."""
    user = system = 0
    for pid in processes:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user, system = user + int(words[11]), system + int(words[12])
    return user / TICK, system / TICK


def at_mount(peer: Peer, image: Path, folder: Path, kind: str, depth: int, seconds: float) -> Used:
    """Figures of one request at a mount, from fio's random requests."""
    with peer.serving(image, image.suffix[1:], folder) as flat:
        processes = serving_processes(image)
        words = [f"--rw={kind}", "--bs=4k", f"--iodepth={depth}", f"--ioengine={'psync' if depth == 1 else 'libaio'}"]
        words += ["--norandommap", "--time_based", f"--runtime={round(seconds * 1000)}ms"]
        # once to have everything in memory
        fio(flat, *words)
        before = used_by(processes)
        iops = fio(flat, *words)
        after = used_by(processes)
    requests = iops * seconds
    user, system = ((later - earlier) * 1e6 / requests for earlier, later in zip(before, after, strict=True))
    return Used(user, system, 1e6 / iops)


def _medians(rounds: list[Used]) -> Used:
    return Used(*map(statistics.median, zip(*rounds, strict=True)))


def report(image: Path, content: Path, folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure reads or writes of one image, and print what each part has of a request."""
    figures = trio.run(lambda: inside(image, writes=kind == "randwrite"))
    peers: list[tuple[Peer, Path]] = [(Cowfs("no-copy-on-read"), image), (Nothing(), content), (Floor(), content)]
    mounts: dict[str, dict[str, Used]] = {}
    for depth in DEPTHS:
        rounds = [
            {peer.name: at_mount(peer, file, folder, kind, depth, options.seconds) for peer, file in peers}
            for _ in range(options.rounds)
        ]
        mounts[str(depth)] = {
            peer.name: Used(
                *(statistics.median(column) for column in zip(*(r[peer.name] for r in rounds), strict=True))
            )
            for peer, _ in peers
        }
    print(f"\n{kind} of 4 KiB, {image.name}: microseconds of a request")
    print(f"  {'storage: one system call':>44}{figures['storage']:8.2f}")
    print(f"  {'format: the tables of the layers':>44}{figures['format']:8.2f}")
    print(f"  {'disk: locks, pieces, counters':>44}{figures['disk'] - figures['format'] - figures['storage']:8.2f}")
    print(f"  {'handler and its guard':>44}{figures['handler'] - figures['disk']:8.2f}")
    for depth, found in mounts.items():
        nothing, all_of_it, floor = found["nothing"], found["cowfs"], found["floor"]
        rest = sum(all_of_it[:2]) - sum(nothing[:2]) - figures["handler"]
        for label, value in (
            (f"depth {depth}: pyfuse3 and the loop", nothing.user),
            ("FUSE in the kernel, for the server", nothing.system),
            ("what is left over", rest),
        ):
            print(f"  {label:>44}{value:8.2f}")
        for label, used in (("all of the server", all_of_it), ("the C passthrough", floor)):
            print(f"  {label:>44}{used.user + used.system:8.2f}   ({used.wall:.2f} on the clock)")
    sys.stdout.flush()
    return {"image": image.name, "kind": kind, "inside": figures, "mounts": mounts}


def main() -> None:
    """Run, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run at a mount")
    parser.add_argument("--size", type=int, default=256, help="MiB of the disk")
    parser.add_argument("--folder", default="/dev/shm", help="where the images lie")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    facts = machine()
    results = []
    with scratch(options.folder) as folder:
        content = make_content(Context(folder, options.size, options.seconds, ()))
        for format in ("qcow2", "qed"):
            convert(content, folder / f"full.{format}", format)
        deep = make_chain(folder, folder / "full.qcow2", 32, options.size)
        cases = [(folder / "full.qcow2", "randread"), (folder / "full.qcow2", "randwrite")]
        for image, kind in [*cases, (folder / "full.qed", "randread"), (folder / "full.qed", "randwrite")]:
            if image.exists():
                results.append(report(image, content, folder, kind, options))
        results.append(report(deep, content, folder, "randread", options))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "layers": results, "block": BLOCK, "mib": MIB}) + "\n")


if __name__ == "__main__":
    main()

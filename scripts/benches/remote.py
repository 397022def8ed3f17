"""Images on another host: how soon they are of use, what that fetches, and how fast a stream and a reader are.

The hosts are network namespaces; the link between them has a delay and a rate (link.c). The far one serves a raw image
with ``qemu-nbd``, and over HTTP; the near one makes an overlay on it. Everything lies in memory.

start   From the command that makes the overlay to the end of a file of a MiB that is read from an ext4 in the middle of
        the image, on a loop device; and what has come over the link by then. cowfs over NBD and over HTTP, QEMU's FUSE
        export of the same overlay with copy-on-read, and a download with ``qemu-img convert`` first.
stream  Bytes a second of a stream over NBD until the image is whole and durable, beside ``nbdcopy --flush``: over
        the link, and over a Unix socket on one host.
read    Bytes a second of reading in order what nobody has read before, beside one plain TCP stream over the link.

Rounds of the peers take turns; what counts are medians of the ratios within a round.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from exports import await_file
from network import FAR, Hosts, two_hosts
from peers import Cowfs, Peer, QemuExport, machine, run
from streamers import CowfsStream, remove, streamed, sync

MIB = 1 << 20
NBD_PORT, HTTP_PORT = 10809, 8080
NBD, HTTP = f"nbd://{FAR}/", f"http://{FAR}:{HTTP_PORT}/disk.raw"
COWFS = Path(sys.executable).with_name("cowfs")
#: the file that is read at the start, among others
WANTED = "middle"


class Goal(NamedTuple):
    """What a median of ratios should be at the least."""

    case: str
    ratio: str
    least: float


GOALS = [
    Goal("start", "download / nbd", 1.0),
    Goal("start", "qemu / nbd", 1.0),
    Goal("stream/link", "cowfs / nbdcopy", 0.9),
    Goal("stream/socket", "cowfs / nbdcopy", 0.9),
    Goal("read", "nbd / link", 0.8),
    Goal("read", "http / link", 0.8),
]


def fill(path: Path, size: int) -> None:
    """Write so many MiB without a zero."""
    with path.open("wb") as file, Path("/dev/urandom").open("rb") as random:
        for _ in range(size):
            file.write(random.read(MIB))


def make_disk(folder: Path, size: int, filled: int) -> tuple[Path, str]:
    """A raw image of ``size`` MiB with an ext4 of ``filled`` MiB of files; and the digest of the one that is read."""
    disk, files = folder / "disk.raw", folder / "files"
    files.mkdir()
    fill(files / "a", filled // 2)
    fill(files / WANTED, 1)
    fill(files / "z", filled - filled // 2)
    run("mkfs.ext4", "-q", "-d", files, disk, f"{size}M")
    digest = hashlib.sha256((files / WANTED).read_bytes()).hexdigest()
    shutil.rmtree(files)
    return disk, digest


def server(disk: Path, *where: str) -> list[str | Path]:
    """How QEMU serves an image."""
    return ["qemu-nbd", "--read-only", "--persistent", "--shared=16", "--format=raw", *where, disk]


@contextmanager
def serving(hosts: Hosts, disk: Path) -> Iterator[None]:
    """Serve a disk from the far host in both ways."""
    web = [sys.executable, Path(__file__).with_name("ranges.py"), disk, FAR, str(HTTP_PORT)]
    with hosts.serving(NBD_PORT, *server(disk, f"--bind={FAR}")), hosts.serving(HTTP_PORT, *web):
        yield


@contextmanager
def serving_socket(folder: Path, disk: Path) -> Iterator[str]:
    """Serve a disk on a Unix socket; yields its URI."""
    path = folder / "socket"
    # which tells of every client that goes
    process = subprocess.Popen(list(map(str, server(disk, f"--socket={path}"))), stderr=subprocess.DEVNULL)
    try:
        await_file(path, process)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


# -- start


def usable(flat: Path, folder: Path, digest: str) -> None:
    """Mount what is in a flat file, and read a file of it."""
    point = folder / "root"
    point.mkdir(exist_ok=True)
    run("mount", "-o", "loop,ro,noload", flat, point)
    try:
        found = hashlib.sha256((point / WANTED).read_bytes()).hexdigest()
    finally:
        run("umount", point)
    if found != digest:
        sys.exit(f"bench: {flat} has another content than was served")


def start_overlay(hosts: Hosts, peer: Peer, url: str, folder: Path, digest: str) -> tuple[float, int]:
    """Seconds and bytes of an overlay."""
    image = folder / "overlay.qcow2"
    peer.prefix = hosts.near
    before, start = hosts.received(), time.monotonic()
    create = [COWFS, "create"] if isinstance(peer, Cowfs) else ["qemu-img", "create"]
    run(*hosts.near, *create, "-q", "-f", "qcow2", "-b", url, "-F", "raw", image)
    with peer.serving(image, "qcow2", folder) as flat:
        usable(flat, folder, digest)
        result = time.monotonic() - start, hosts.received() - before
    check_alone(image)
    remove(image)
    return result


def check_alone(image: Path) -> None:
    """Ask QEMU whether an overlay is sound; what it lies on is on another host."""
    file = {"driver": "file", "filename": str(image)}
    run("qemu-img", "check", "-q", "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file}))


def start_download(hosts: Hosts, folder: Path, digest: str) -> tuple[float, int]:
    """Seconds and bytes of a copy."""
    image = folder / "copy.raw"
    before, start = hosts.received(), time.monotonic()
    run(*hosts.near, "qemu-img", "convert", "-f", "raw", "-O", "raw", NBD, image)
    usable(image, folder, digest)
    result = time.monotonic() - start, hosts.received() - before
    image.unlink()
    return result


def run_start(hosts: Hosts, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Each way to come to the same file."""
    disk, digest = make_disk(folder, options.size, options.filled)
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        "nbd": lambda: start_overlay(hosts, Cowfs(), NBD, folder, digest),
        "http": lambda: start_overlay(hosts, Cowfs(), HTTP, folder, digest),
        "download": lambda: start_download(hosts, folder, digest),
    }
    pairs = [("download", "nbd"), ("download", "http")]
    if not options.without_qemu:
        ways["qemu"] = lambda: start_overlay(hosts, QemuExport(copy_on_read=True), NBD, folder, digest)
        pairs.append(("qemu", "nbd"))
    rounds, fetched = [], []
    with serving(hosts, disk):
        for number in range(options.rounds):
            found = {name: ways[name]() for name in turned(ways, number)}
            rounds.append({name: seconds for name, (seconds, _) in found.items()})
            fetched.append({name: float(size) for name, (_, size) in found.items()})
    disk.unlink()
    # of times, the smaller is the better
    return {**reckoned(rounds, pairs), "bytes": fetched}


# -- stream


def streamed_over(prefix: tuple[str, ...], url: str, base: Path, folder: Path) -> float:
    """Bytes a second of a stream."""
    image = folder / "overlay.qcow2"
    peer = CowfsStream()
    peer.prefix = prefix
    run(*prefix, COWFS, "create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", image)
    return streamed(peer, image, base)


def copied(prefix: tuple[str, ...], url: str, base: Path, folder: Path) -> float:
    """Bytes a second of nbdcopy."""
    target = folder / "copy.raw"
    start = time.monotonic()
    run(*prefix, "nbdcopy", "--flush", url, target)
    sync(target)
    elapsed = time.monotonic() - start
    target.unlink()
    return base.stat().st_size / elapsed


def run_stream(hosts: Hosts, folder: Path, options: argparse.Namespace, where: str) -> dict[str, Any]:
    """A stream and nbdcopy, over the link or a socket."""
    base = folder / "base.raw"
    fill(base, options.link_size if where == "link" else options.socket_size)
    is_link = where == "link"
    prefix = hosts.near if is_link else ()
    rounds = []
    with serving(hosts, base) if is_link else nullcontext(), serving_socket(folder, base) as uri:
        url = NBD if is_link else uri
        ways = {
            "cowfs": lambda: streamed_over(prefix, url, base, folder),
            "nbdcopy": lambda: copied(prefix, url, base, folder),
        }
        for number in range(options.rounds):
            rounds.append({name: ways[name]() for name in turned(ways, number)})
    base.unlink()
    return reckoned(rounds, [("cowfs", "nbdcopy")])


# -- read


def read(hosts: Hosts, url: str, base: Path, folder: Path) -> float:
    """Bytes a second of a reader, as a mount is by default."""
    image = folder / "overlay.qcow2"
    peer = Cowfs()
    peer.prefix = hosts.near
    run(*hosts.near, COWFS, "create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", image)
    with peer.serving(image, "qcow2", folder) as flat:
        start = time.monotonic()
        with flat.open("rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        elapsed = time.monotonic() - start
    with base.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != found:
            sys.exit(f"bench: {url} has been read wrongly")
    check_alone(image)
    remove(image)
    return base.stat().st_size / elapsed


def run_read(hosts: Hosts, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Readers and the link."""
    base = folder / "base.raw"
    fill(base, options.link_size)
    ways = {
        "nbd": lambda: read(hosts, NBD, base, folder),
        "http": lambda: read(hosts, HTTP, base, folder),
        "link": lambda: hosts.rate(base.stat().st_size),
    }
    with serving(hosts, base):
        rounds = [{name: ways[name]() for name in turned(ways, number)} for number in range(options.rounds)]
    base.unlink()
    return reckoned(rounds, [("nbd", "link"), ("http", "link")])


# -- figures


def turned(ways: Mapping[str, object], number: int) -> list[str]:
    """Names, beginning with another one each round."""
    names = list(ways)
    number %= len(names)
    return names[number:] + names[:number]


def reckoned(rounds: list[dict[str, float]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the rounds with the medians of their figures, and of the ratios of pairs of them."""
    return {
        "rounds": rounds,
        "median": {name: statistics.median(found[name] for found in rounds) for name in rounds[0]},
        "ratio": {
            f"{one} / {other}": statistics.median(found[one] / found[other] for found in rounds) for one, other in pairs
        },
    }


def show(case: str, found: dict[str, Any]) -> None:
    """Print a case."""
    unit, scale = ("s", 1.0) if case == "start" else ("MB/s", 1e6)
    print(f"{case} ({unit})")
    for name, figure in found["median"].items():
        line = f"    {name:20}{figure / scale:10.2f}"
        if "bytes" in found:
            fetched = statistics.median(sizes[name] for sizes in found["bytes"])
            line += f"{fetched / 1e6:12.1f} MB fetched"
        print(line)
    for name, ratio in found["ratio"].items():
        print(f"    {name:20}{ratio:10.2f}", flush=True)


def judged(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Print which goals were reached."""
    goals = []
    for goal in GOALS:
        if goal.case in results and goal.ratio in results[goal.case]["ratio"]:
            got = results[goal.case]["ratio"][goal.ratio]
            reached = got >= goal.least
            print(f"{'reached' if reached else 'missed':8}{goal.case:16}{goal.ratio:20}{got:6.2f} of {goal.least:.2f}")
            goals.append({**goal._asdict(), "got": got, "reached": reached})
    return goals


CASES: dict[str, Callable[[Hosts, Path, argparse.Namespace], dict[str, Any]]] = {
    "start": run_start,
    "stream/link": lambda hosts, folder, options: run_stream(hosts, folder, options, "link"),
    "stream/socket": lambda hosts, folder, options: run_stream(hosts, folder, options, "socket"),
    "read": run_read,
}


def options_of(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench remote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of small sizes: that it works")
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES), help="cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20, help="milliseconds over the link and back")
    parser.add_argument("--rate", type=float, default=200, help="Mbit/s of the link, each way")
    parser.add_argument("--size", type=int, default=2048, help="MiB of the image for start")
    parser.add_argument("--filled", type=int, default=1024, help="MiB of files in it")
    parser.add_argument("--link-size", type=int, default=128, help="MiB that are streamed and read over the link")
    parser.add_argument("--socket-size", type=int, default=1024, help="MiB that are streamed over a socket")
    parser.add_argument("--without-qemu", action="store_true", help="leave its export out")
    parser.add_argument("--folder", default="/dev/shm", help="where images lie")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(words)
    if options.quick:
        options.rounds, options.size, options.filled, options.link_size, options.socket_size = 1, 32, 8, 4, 8
    return options


def main() -> None:
    """Run, print tables, and write JSON where asked."""
    options = options_of(sys.argv[1:])
    if os.geteuid():
        sys.exit("bench: hosts and loop devices take root")
    folder = Path(tempfile.mkdtemp(prefix="cowfs-bench.", dir=options.folder))
    results: dict[str, dict[str, Any]] = {}
    try:
        with two_hosts(folder, options.delay, options.rate) as hosts:
            for case in options.only:
                results[case] = CASES[case](hosts, folder, options)
                show(case, results[case])
    finally:
        shutil.rmtree(folder)
    goals = judged(results)
    if options.json:
        link = {"milliseconds": options.delay, "mbit": options.rate}
        text = json.dumps({"machine": machine(), "link": link, "results": results, "goals": goals}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

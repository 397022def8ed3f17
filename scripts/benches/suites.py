"""The suites that are more than fio on a flat file: a file system, the start of a large image, jobs."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from exports import BOUNDS, SERVERS, memory, peers_named
from peers import PATIENCE, Cowfs, check, fio, run
from workloads import (
    MIB,
    SEED,
    TABLE,
    Context,
    Figures,
    Steady,
    Suite,
    allocating,
    check_and_remove,
    convert,
    copy,
    first_touch,
    make_content,
    make_overlay,
    turn,
)

TIB = 1 << 40
#: seconds that a job may take
JOB_PATIENCE = 300.0


class FileSystem(Suite):
    """An ext4 file system on a loop device, on an image that is new: what a guest with a file system makes of it.

    The loop device passes the page cache of the flat file, except QEMU's, whose export (7.2) breaks file systems then.
    """

    names = ("ext4",)

    def cases(self) -> list[str]:
        """Return the three of them, which belong together."""
        return ["ext4/unpack", "ext4/read-back", "ext4/fsync-4k"]

    def prepare(self, context: Context) -> None:
        """Pack a tree of small files, a quarter of the usual disk."""
        rnd = random.Random(SEED)
        left = context.size * MIB // 4
        with tarfile.open(context.folder / "tree.tar", "w") as archive:
            for number in range(1 << 20):
                size = min(int(rnd.lognormvariate(9.5, 1.4)), left)
                entry = tarfile.TarInfo(f"tree/{number // 100 % 10}/{number // 100}/{number}")
                entry.size = size
                archive.addfile(entry, BytesIO(rnd.randbytes(size)))
                left -= size
                if not left:
                    break

    def round(self, context: Context, number: int) -> Iterator[Figures]:
        """Do all three with each peer."""
        if not any(map(context.wants, self.cases())):
            return
        found: dict[str, dict[str, float]] = {case: {} for case in self.cases()}
        for peer in turn(peers_named(context.present((*SERVERS, *BOUNDS))), number):
            format = "raw" if peer.name in BOUNDS else "qcow2"
            image = context.folder / f"ext4-{peer.name}"
            run("qemu-img", "create", "-q", "-f", format, image, f"{4 * context.size}M")
            with peer.serving(image, format, context.folder) as flat:
                values = self._use(flat, context, direct=peer.name != "qemu")
                for case, value in zip(self.cases(), values, strict=True):
                    found[case][peer.name] = value
            check_and_remove(image, format)
        for case, unit in zip(self.cases(), ("MB/s", "MB/s", "IOPS"), strict=True):
            yield Figures(case, unit, found[case])

    def _use(self, flat: Path, context: Context, *, direct: bool) -> list[float]:
        """Unpack until it is durable, read back what no cache has, and write with an fsync each."""
        archive, point = context.folder / "tree.tar", context.folder / "ext4"
        point.mkdir(exist_ok=True)
        size = archive.stat().st_size / 1e6
        with attached(flat, direct=direct) as device:
            run("mkfs.ext4", "-q", "-E", "nodiscard", device)
            with mounted(device, point):
                unpacking = seconds(lambda: (run("tar", "-C", point, "-xf", archive), run("sync", "-f", point)))
            drop_pages(flat)
            with mounted(device, point):
                reading = seconds(lambda: run("sh", "-c", 'find "$1" -type f -exec cat {} + >/dev/null', "sh", point))
                words = ["--rw=randwrite", "--bs=4k", "--size=16M", "--ioengine=psync", "--direct=0", "--fsync=1"]
                syncing = fio(point / "file", *words, *context.limit)
        return [size / unpacking, size / reading, syncing]


@contextmanager
def attached(flat: Path, *, direct: bool) -> Iterator[str]:
    """Yield a loop device on a file; if ``direct``, it passes the page cache of whatever shows it."""
    device = run("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", flat).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def drop_pages(file: Path) -> None:
    """Have the page cache hold nothing of a file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def mounted(device: str, point: Path) -> Iterator[None]:
    """Mount a device for as long as the context lasts."""
    run("mount", device, point)
    try:
        yield
    finally:
        run("umount", point)


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


class Start(Suite):
    """An image of 1 TiB, all of its clusters allocated (as holes): how soon it is there, and what it takes.

    From the start of the command that serves it to the first 4 KiB read from its middle; the memory after that, and
    after random reads all over the disk. "added": what cowfs takes to add it to a mount that is there, by the control
    file; the others have to start as before.
    """

    names = ("start",)

    def cases(self) -> list[str]:
        """Return them."""
        return ["start/first-byte", "start/first-byte-added", "start/memory", "start/memory-used"]

    def prepare(self, context: Context) -> None:
        """Make the image; its tables take 160 MiB."""
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", self._image(context), "1T")

    def _image(self, context: Context) -> Path:
        return context.folder / "large.qcow2"

    def round(self, context: Context, number: int) -> Iterator[Figures]:
        """Start each once."""
        if not any(map(context.wants, self.cases())):
            return
        found: dict[str, dict[str, float]] = {case: {} for case in self.cases()}
        image = self._image(context)
        for peer in turn(peers_named(context.present(SERVERS)), number):
            start = time.monotonic()
            with peer.serving(image, "qcow2", context.folder) as flat:
                read_middle(flat)
                found["start/first-byte"][peer.name] = time.monotonic() - start
                found["start/memory"][peer.name] = memory(image)
                TABLE[3].run(flat, *context.limit)
                found["start/memory-used"][peer.name] = memory(image)
        found["start/first-byte-added"] = dict(found["start/first-byte"])
        if "cowfs" in context.names:
            found["start/first-byte-added"]["cowfs"] = self._add(context)
        for case in self.cases():
            yield Figures(case, "MiB" if "memory" in case else "s", found[case], lower_is_better=True)

    def _add(self, context: Context) -> float:
        other = context.folder / "other.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", other, "1G")
        with Cowfs().serving(other, "qcow2", context.folder) as flat:
            control = flat.parent / ".cowfs/control"
            start = time.monotonic()
            control.write_text(f"add large={self._image(context)}")
            read_middle(flat.with_name("large"))
            return time.monotonic() - start


def read_middle(flat: Path) -> None:
    """Read 4 KiB from the middle of the large disk."""
    descriptor = os.open(flat, os.O_RDONLY)
    try:
        os.pread(descriptor, 4096, TIB // 2)
    finally:
        os.close(descriptor)


class Jobs(Suite):
    """Streams and commits of whole disks while nobody uses them; beside QEMU's jobs, and ``qemu-img commit``.

    MB/s of the disk, of which nothing is a hole. QEMU's daemon has the image and the job alone: a writable FUSE export
    lets neither job start. Both commits end with the base alone in use (``pivot=yes``).
    """

    names = ("jobs",)

    def cases(self) -> list[str]:
        """Return them: two jobs, and the command on files."""
        return ["jobs/stream", "jobs/commit", "jobs/commit-offline"]

    def prepare(self, context: Context) -> None:
        """Make a full base, and an overlay that holds all of another disk."""
        base = context.folder / "jobs-base.raw"
        copy(make_content(context), base)
        full = context.folder / "jobs-full.qcow2"
        convert(make_content(context), full, "qcow2")
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "raw", full)

    def round(self, context: Context, number: int) -> Iterator[Figures]:
        """Do each with both, on new images."""
        image, base = context.folder / "jobs.qcow2", context.folder / "jobs-base.raw"
        for case in self.cases():
            if not context.wants(case):
                continue
            values = {}
            for name in turn_names(context.present(("cowfs", "qemu")), number):
                if case == "jobs/stream":
                    make_overlay(image, "qcow2", base, "raw")
                else:
                    copy(context.folder / "jobs-full.qcow2", image)
                verb = case.partition("/")[2]
                if verb == "commit-offline":
                    tool = Path(sys.executable).with_name("cowfs") if name == "cowfs" else "qemu-img"
                    taken = seconds(lambda tool=tool: run(tool, "commit", image))
                else:
                    taken = (cowfs_job if name == "cowfs" else qemu_job)(verb, image, context.folder)
                values[name] = context.size * MIB / 1e6 / taken
                if verb != "stream":
                    run("cmp", make_content(context), base)
                if (name, verb) != ("cowfs", "commit"):
                    # what cowfs leaves behind with a pivot is marked, and nobody opens it any more
                    check(image, "qcow2")
                image.unlink()
            yield Figures(case, "MB/s", values)


def turn_names(names: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Have another begin in each round."""
    number %= max(len(names), 1)
    return names[number:] + names[:number]


def cowfs_job(verb: str, image: Path, folder: Path) -> float:
    """Run a job on a mounted image; seconds from the command to its end."""
    with Cowfs().serving(image, "qcow2", folder) as flat:
        file = flat.parent / f".cowfs/disk/{verb}"
        start = time.monotonic()
        file.write_text("start" if verb == "stream" else "start pivot=yes")
        while (facts := file.read_text()).startswith("state: running") or "state: ready" in facts:
            if time.monotonic() > start + JOB_PATIENCE:
                sys.exit(f"bench: {verb} does not end: {facts}")
            time.sleep(0.005)
        taken = time.monotonic() - start
    if not facts.startswith("state: completed"):
        sys.exit(f"bench: {verb}: {facts}")
    return taken


class Monitor:
    """QEMU's storage daemon with one image, steered over its standard input and output."""

    def __init__(self, image: Path) -> None:
        words = ["--chardev", "stdio,id=monitor,signal=off", "--monitor", "chardev=monitor"]
        words += ["--blockdev", f"driver=file,node-name=file,filename={image}"]
        words += ["--blockdev", "driver=qcow2,node-name=disk,file=file"]
        self._process = subprocess.Popen(
            ["qemu-storage-daemon", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.next()
        self.command("qmp_capabilities")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)

    def next(self) -> dict[str, Any]:
        """Return what it says next: an answer or an event."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("bench: qemu-storage-daemon has ended")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            sys.exit(f"bench: qemu-storage-daemon: {found['error']['desc']}")
        return found

    def command(self, name: str, **arguments: object) -> None:
        """Give a command; events wait."""
        assert self._process.stdin is not None
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._process.stdin.write(json.dumps({"execute": name, "arguments": words}) + "\n")
        self._process.stdin.flush()


def qemu_job(verb: str, image: Path, folder: Path) -> float:
    """Run a job of QEMU's daemon; seconds from the command to its end."""
    with Monitor(image) as monitor:
        start = time.monotonic()
        monitor.command(f"block-{verb}", job_id="job", device="disk")
        while True:
            said = monitor.next()
            if said.get("event") == "BLOCK_JOB_READY":
                monitor.command("job-complete", id="job")
            elif said.get("event") == "BLOCK_JOB_COMPLETED":
                if "error" in said["data"]:
                    sys.exit(f"bench: block-{verb}: {said['data']['error']}")
                return time.monotonic() - start
            elif said.get("event") == "BLOCK_JOB_CANCELLED":
                sys.exit(f"bench: block-{verb} was cancelled")


def all_suites() -> list[Suite]:
    """Return every suite, in the order of the table."""
    reads = [job for job in TABLE if not job.writes]
    compressed = [TABLE[0], TABLE[2], TABLE[3], TABLE[5]]
    return [
        Steady({"qcow2": TABLE}),
        Steady({"qed": TABLE}),
        Steady({"chain2": TABLE, "chain32": reads}, fresh=True),
        allocating(),
        first_touch(),
        Steady({"compressed-zlib": compressed, "compressed-zstd": compressed}),
        FileSystem(),
        Jobs(),
        Start(),
    ]


@contextmanager
def scratch(where: str) -> Iterator[Path]:
    """Yield a new folder, gone afterwards with all that is in it; SIGTERM ends the program in order, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: was told to end"))
    with tempfile.TemporaryDirectory(prefix="cowfs-bench.", dir=where) as folder:
        yield Path(folder)

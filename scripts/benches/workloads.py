"""The workloads of a comparison, and the images they run on.

A suite makes its images once, and is then asked for rounds. A round yields figures case by case, with the peers taking
turns inside a case, so that what is compared was measured within seconds.
"""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from exports import BOUNDS, SERVERS, memory, peers_named
from peers import Peer, check, fio, run

MIB = 1 << 20
#: bytes; what both formats have unless told otherwise
CLUSTER = 65536
SEED = 1


@dataclass
class Context:
    """Where and how long; ``size`` is the MiB of a disk, ``seconds`` those of a run that is bounded by time."""

    folder: Path
    size: int
    seconds: float
    names: Sequence[str]
    #: cases that are wanted; all where it is empty
    only: Sequence[str] = field(default=())

    def wants(self, case: str) -> bool:
        """Whether a case was asked for: by its name, or by that of its suite."""
        return not self.only or any(case == name or case.startswith(f"{name}/") for name in self.only)

    @property
    def limit(self) -> list[str]:
        """What bounds a fio job by time; fio takes a number without a unit for whole seconds."""
        return ["--time_based", f"--runtime={round(self.seconds * 1000)}ms"]

    def present(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of some peers that take part."""
        return tuple(name for name in names if name in self.names)


class Figures(NamedTuple):
    """What one round found in one case."""

    case: str
    unit: str
    values: dict[str, float]
    lower_is_better: bool = False


class Suite(ABC):
    """Cases that share their images."""

    #: what its cases are called, up to the slash
    names: tuple[str, ...]

    @abstractmethod
    def cases(self) -> list[str]:
        """Return the names of all cases."""

    @abstractmethod
    def prepare(self, context: Context) -> None:
        """Make the images."""

    @abstractmethod
    def round(self, context: Context, number: int) -> Iterator[Figures]:
        """Measure every case that is wanted once, with every peer."""


class Job(NamedTuple):
    """One fio job; ``block`` is the bytes of a request. Sequential ones are told in MB/s, random ones in IOPS."""

    name: str
    kind: str
    block: int
    depth: int = 1
    direct: bool = True

    @property
    def writes(self) -> bool:
        """Whether it changes the disk."""
        return "write" in self.kind

    @property
    def unit(self) -> str:
        """What its figure counts."""
        return "IOPS" if self.block < CLUSTER else "MB/s"

    def run(self, flat: Path, *bounds: str) -> float:
        """Run it within bounds; the figure."""
        iops = fio(flat, *self.options(), *bounds)
        return iops if self.unit == "IOPS" else iops * self.block / 1e6

    def options(self) -> list[str]:
        """Return what fio is told: one system call at a time at depth 1, libaio beyond."""
        words = [f"--rw={self.kind}", f"--bs={self.block}", f"--direct={int(self.direct)}", f"--iodepth={self.depth}"]
        words.append(f"--ioengine={'psync' if self.depth == 1 else 'libaio'}")
        # without a map of what has been done, which would cost fio more than the request
        return [*words, "--norandommap"] if self.kind.startswith("rand") else words


def _random(kind: str, block: int, depth: int) -> Job:
    return Job(f"{kind}-{block >> 10}k-d{depth}", kind, block, depth)


TABLE = [
    Job("read-1m-d1", "read", MIB),
    Job("read-1m-d4", "read", MIB, 4),
    _random("randread", 4096, 1),
    _random("randread", 4096, 32),
    _random("randread", CLUSTER, 8),
    Job("buffered-read", "read", MIB, direct=False),
    Job("write-1m-d1", "write", MIB),
    Job("write-1m-d4", "write", MIB, 4),
    _random("randwrite", 4096, 1),
    _random("randwrite", 4096, 32),
    Job("buffered-write", "write", MIB, direct=False),
]


def timed(job: Job, context: Context) -> list[str]:
    """Return the bounds of a job on space that is there: some seconds, but for buffered ones, which go through once.

    fio drops the pages of the file first. What is left dirty at the end counts, by an fsync.
    """
    if not job.direct:
        return ["--end_fsync=1"] if job.writes else []
    return context.limit


def once(job: Job, context: Context) -> list[str]:
    """Return the bounds of a job that finds each cluster new: half as many requests as there are clusters."""
    return [f"--io_size={min(context.size * MIB // CLUSTER // 2 * job.block, context.size * MIB)}"]


# -- images


def make_content(context: Context) -> Path:
    """Return a raw file without a zero; made once."""
    path = context.folder / "content.raw"
    if not path.exists():
        with path.open("wb") as file:
            for _ in range(context.size):
                file.write(os.urandom(MIB))
    return path


def make_text(context: Context) -> Path:
    """Return a raw file that compresses to about a third, as logs do; made once."""
    path = context.folder / "text.raw"
    if not path.exists():
        rnd = random.Random(SEED)
        words = [rnd.randbytes(rnd.randrange(2, 9)).hex() for _ in range(4000)]
        with path.open("wb") as file:
            for _ in range(context.size):
                text = " ".join(rnd.choices(words, k=MIB // 8)).encode()
                file.write(text[:MIB].ljust(MIB, b"\n"))
    return path


def convert(source: Path, target: Path, format: str, *options: str) -> None:
    """Make an image with the content of a raw file."""
    run("qemu-img", "convert", "-f", "raw", "-O", format, *options, source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    run("cp", "--sparse=auto", source, target)


def make_overlay(path: Path, format: str, base: Path, base_format: str) -> None:
    """Make an empty overlay."""
    run("qemu-img", "create", "-q", "-f", format, "-b", base, "-F", base_format, path)


def make_chain(folder: Path, base: Path, depth: int, size: int) -> Path:
    """Put overlays on a full base until there are so many layers; each holds as many clusters as any other.

    Which ones is random, the same each time. ``size`` in MiB; returns the active layer.
    """
    rnd = random.Random(SEED)
    owners = [rnd.randrange(depth) for _ in range(size * MIB // CLUSTER)]
    below = base
    for layer in range(1, depth):
        path = folder / f"chain{depth}-{layer}.qcow2"
        make_overlay(path, "qcow2", below, "qcow2")
        mine = [number for number, owner in enumerate(owners) if owner == layer]
        commands = "".join(f"write -q -P {layer} {number * CLUSTER} {CLUSTER}\n" for number in mine)
        run("qemu-io", "-f", "qcow2", path, text=commands)
        below = path
    return below


# -- suites


class Steady(Suite):
    """The table, on images that each peer has a copy of and serves for a whole round.

    ``kinds`` are sets of images by their names, with the jobs that each takes part in; every job is done on one after
    the other. With ``fresh`` a job that writes begins with new copies, since it changes what there is to measure.
    """

    def __init__(self, kinds: dict[str, Sequence[Job]], *, fresh: bool = False) -> None:
        self.names = tuple(kinds)
        self._kinds = kinds
        self._fresh = fresh
        self._images: dict[str, tuple[Path, str]] = {}
        self._content = Path()

    def cases(self) -> list[str]:
        """Return all, job by job, and the memory of the servers."""
        jobs = dict.fromkeys(job for jobs in self._kinds.values() for job in jobs)
        found = [f"{kind}/{job.name}" for job in jobs for kind in self.names if job in self._kinds[kind]]
        return [*found, *(f"{kind}/memory" for kind in self.names)]

    def prepare(self, context: Context) -> None:
        """Make one image of each kind."""
        self._content = make_text(context) if self.names[0].startswith("compressed") else make_content(context)
        for kind in self.names:
            if any(context.wants(case) for case in self.cases() if case.startswith(f"{kind}/")):
                self._images[kind] = self._make(kind, context)

    def _make(self, kind: str, context: Context) -> tuple[Path, str]:
        path = context.folder / f"{kind}.image"
        if kind.startswith("chain"):
            base = context.folder / "base.qcow2"
            if not base.exists():
                convert(self._content, base, "qcow2")
            return make_chain(context.folder, base, int(kind.removeprefix("chain")), context.size), "qcow2"
        if kind.startswith("compressed"):
            convert(self._content, path, "qcow2", "-c", "-o", f"compression_type={kind.partition('-')[2]}")
            return path, "qcow2"
        convert(self._content, path, kind)
        return path, kind

    def round(self, context: Context, number: int) -> Iterator[Figures]:
        """Serve all images at once, and go through the jobs."""
        for kinds, jobs in self._sittings(context):
            with ExitStack() as stack:
                served = {kind: stack.enter_context(self._served(kind, context, number)) for kind in kinds}
                for job in jobs:
                    for kind in kinds:
                        if job in self._kinds[kind] and context.wants(case := f"{kind}/{job.name}"):
                            bounds = once if self._fresh and job.writes else timed
                            values = {name: job.run(flat, *bounds(job, context)) for name, flat in served[kind].items()}
                            yield Figures(case, job.unit, values)
                for kind in kinds:
                    if not (self._fresh and jobs[0].writes) and context.wants(f"{kind}/memory"):
                        values = {n: memory(self._copy(kind, n, context)) for n in served[kind] if n not in BOUNDS}
                        yield Figures(f"{kind}/memory", "MiB", values, lower_is_better=True)

    def _sittings(self, context: Context) -> Iterator[tuple[list[str], list[Job]]]:
        """Images that are served together, and the jobs on them: all, or each job that writes by itself."""
        jobs = list(dict.fromkeys(job for jobs in self._kinds.values() for job in jobs))
        steady = [job for job in jobs if not (self._fresh and job.writes)]
        for part in [steady, *([job] for job in jobs if job not in steady)]:
            wanted = [
                kind
                for kind in self._images
                if any(job in self._kinds[kind] and context.wants(f"{kind}/{job.name}") for job in part)
                or (part is steady and context.wants(f"{kind}/memory"))
            ]
            if wanted:
                yield wanted, part

    def _copy(self, kind: str, name: str, context: Context) -> Path:
        """Where a peer's own image lies; the bounds share one."""
        return context.folder / f"copy-{kind}-{'bounds' if name in BOUNDS else name}"

    @contextmanager
    def _served(self, kind: str, context: Context, number: int) -> Iterator[dict[str, Path]]:
        image, format = self._images[kind]
        with ExitStack() as stack:
            flats = {}
            for peer in turn(peers_named(context.present((*SERVERS, *BOUNDS))), number):
                mine = self._copy(kind, peer.name, context)
                bound = peer.name in BOUNDS
                if not mine.exists():
                    copy(self._content if bound else image, mine)
                    stack.callback(check_and_remove, mine, "raw" if bound else format)
                corner = context.folder / f"at-{kind}"
                corner.mkdir(exist_ok=True)
                flats[peer.name] = stack.enter_context(peer.serving(mine, "raw" if bound else format, corner))
            yield flats


def turn(peers: list[Peer], number: int) -> list[Peer]:
    """Have another peer begin in each round."""
    number %= max(len(peers), 1)
    return peers[number:] + peers[:number]


def check_and_remove(image: Path, format: str) -> None:
    """See that an image has come out sound."""
    if format != "raw":
        check(image, format)
    image.unlink()


class Fresh(Suite):
    """Jobs that find each cluster new, on an empty overlay each: allocating writes, and reads that are copied up."""

    def __init__(self, name: str, jobs: dict[str, tuple[str, Job, bool]], *, copy_on_read: bool = False) -> None:
        self.names = (name,)
        self._jobs = jobs
        self._copy_on_read = copy_on_read

    def cases(self) -> list[str]:
        """Return one for each job."""
        return [f"{self.names[0]}/{name}" for name in self._jobs]

    def prepare(self, context: Context) -> None:
        """Make what the overlays lie on."""
        make_content(context)

    def round(self, context: Context, number: int) -> Iterator[Figures]:
        """Make, serve, measure and check an overlay for each case and peer."""
        for name, (format, job, fsync) in self._jobs.items():
            if not context.wants(case := f"{self.names[0]}/{name}"):
                continue
            values = {}
            for peer in turn(peers_named(context.present(SERVERS), copy_on_read=self._copy_on_read), number):
                image = context.folder / f"fresh-{peer.name}"
                make_overlay(image, format, make_content(context), "raw")
                with peer.serving(image, format, context.folder) as flat:
                    values[peer.name] = job.run(flat, *once(job, context), f"--end_fsync={int(fsync)}")
                check_and_remove(image, format)
            yield Figures(case, job.unit, values)


def allocating() -> Fresh:
    """Random writes into an empty overlay; half as many as there are clusters."""
    jobs = {
        f"{format}-d{depth}{'-fsync' if fsync else ''}": (format, _random("randwrite", 4096, depth), fsync)
        for format in ("qcow2", "qed")
        for depth in (1, 32)
        for fsync in (False, True)
    }
    return Fresh("allocate", jobs)


def first_touch() -> Fresh:
    """Reads of what lies below, with copy-on-read on."""
    jobs = {job.name: ("qcow2", job, False) for job in (TABLE[0], _random("randread", 4096, 1), TABLE[3])}
    return Fresh("copy-on-read", jobs, copy_on_read=True)

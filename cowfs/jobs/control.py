"""The jobs of one disk, as commands start and steer them: ``start speed=1M``, ``pause``, ``speed=0``, …"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import trio

from cowfs.block.disk import Disk
from cowfs.errors import Busy, UsageError
from cowfs.jobs.changes import Changes
from cowfs.jobs.commit import Commit
from cowfs.jobs.job import Job, OnError, State
from cowfs.jobs.stream import Stream
from cowfs.units import parse_size


class Neighbour(NamedTuple):
    """Another disk of the same mount, and what the user calls it."""

    name: str
    disk: Disk


class Kind(NamedTuple):
    """One kind of job, and the values that each key of its ``start`` takes; others are refused.

    ``later`` holds values and keys that belong to the language but are not built; None is any value.
    """

    make: type[Job]
    keys: Mapping[str, Sequence[str]]
    later: Mapping[str, Sequence[str] | None]


_POLICIES = tuple(policy.value for policy in OnError)

KINDS: dict[str, Kind] = {
    "stream": Kind(Stream, {"on-error": _POLICIES}, {"base": None}),
    "commit": Kind(
        Commit,
        {"on-error": _POLICIES, "pivot": ("no",)},
        {"base": None, "top": None, "pivot": ("yes",)},
    ),
}

#: what can be written to a job file, with a line of help for each
COMMANDS: dict[str, str] = {
    "start": "start [KEY=VALUE…]: begin the job",
    "pause": "pause: stop at the next step",
    "resume": "resume: go on after a pause",
    "cancel": "cancel: end the job; what it has done stays done",
    "complete": "complete: tell a job that is ready to finish",
    "speed": "speed=BYTES_PER_SECOND: limit what is copied; 0 lifts the limit",
}


class JobControl:
    """At most one active job on a disk, and the last one of each kind."""

    def __init__(
        self, disk: Disk, nursery: trio.Nursery, neighbours: Callable[[], Iterable[Neighbour]] = lambda: ()
    ) -> None:
        self._disk = disk
        self._nursery = nursery
        self._neighbours = neighbours
        self.jobs: dict[str, Job] = {}
        self._kept_out: str | None = None
        #: changes of state, for each kind of job
        self.changes = {verb: Changes() for verb in KINDS}
        #: called at every change of any job's state
        self.on_change: Callable[[], None] = lambda: None

    @property
    def active(self) -> Job | None:
        """The job that goes on, or is about to."""
        return next((job for job in self.jobs.values() if job.state.is_active or job.state is State.NONE), None)

    @contextmanager
    def kept_out(self, reason: str) -> Iterator[None]:
        """No job starts while the context lasts; `Busy` if one is active, or if this is under way already."""
        self._require_none()
        self._kept_out = reason
        try:
            yield
        finally:
            self._kept_out = None

    def _require_none(self) -> None:
        active = self.active
        if active is not None:
            raise Busy(f"a {active.verb} job is {active.state.value}; wait for it, or cancel it")
        if self._kept_out is not None:
            raise Busy(self._kept_out)

    async def command(self, verb: str, text: str) -> None:
        """Obey one command for the ``stream`` or ``commit`` job.

        Raises `UsageError` for words that are not understood or do not fit the job's state, `Busy` for a
        conflict, `ReadOnly`.
        """
        words = text.split()
        name = words[0].partition("=")[0] if words else ""
        if name == "start" and words[0] == name:
            await self._start(verb, words[1:])
        elif len(words) != 1 or name not in COMMANDS or (name == "speed") != ("=" in words[0]):
            raise UsageError(f"'{text}' is no command; {verb} takes start, pause, resume, cancel, complete, speed=N")
        else:
            await self._steer(verb, name, words[0].partition("=")[2])

    async def _steer(self, verb: str, name: str, value: str) -> None:
        job = self.jobs.get(verb)
        if job is None or job is not self.active:
            raise UsageError(f"no {verb} job is active, so there is nothing to {name}")
        if name == "speed":
            job.set_speed(parse_size(value))
        elif name == "cancel":
            job.cancel()
            await job.wait()
        else:
            {"pause": job.pause, "resume": job.resume, "complete": job.complete}[name]()

    async def _start(self, verb: str, words: Sequence[str]) -> None:
        speed, on_error = _parse_keys(verb, words)
        self._require_none()
        self._disk.layers[0].require_writable()
        if verb == "commit":
            self._check_base()
        job = KINDS[verb].make(self._disk, speed=speed, on_error=on_error)
        job.on_change = partial(self._changed, verb)
        self.jobs[verb] = job
        self._nursery.start_soon(job.run)
        while job.state is State.NONE:
            # whoever gave the command reads the job file next
            await trio.lowlevel.checkpoint()

    def _changed(self, verb: str) -> None:
        self.changes[verb].happened()
        self.on_change()

    def _check_base(self) -> None:
        """Commit writes into a backing file, which must be nobody else's layer."""
        if len(self._disk.layers) == 1:
            raise UsageError("there is no backing file to commit into")
        base = self._disk.layers[1]
        written = {storage.identity for storage in base.storages}
        for name, disk in self._neighbours():
            if any(storage.identity in written for layer in disk.layers for storage in layer.storages):
                raise Busy(f"its backing file {base.name} is in use by '{name}'")


def _parse_keys(verb: str, words: Sequence[str]) -> tuple[int, OnError]:
    """Check the words after ``start``; bytes a second, and what to do about errors."""
    kind, speed, on_error = KINDS[verb], 0, OnError.REPORT
    for word in words:
        key, sign, value = word.partition("=")
        if key == "speed" and sign:
            speed = parse_size(value)
        elif not sign or (key not in kind.keys and key not in kind.later):
            raise UsageError(f"{verb} has no key '{key}'; it takes {', '.join(sorted({'speed', *kind.keys}))}")
        elif value not in kind.keys.get(key, ()):
            later = kind.later.get(key, ())
            if later is None or value in later:
                raise UsageError(f"this version does not offer {word}")
            raise UsageError(f"{key}={value} is not one of {', '.join(kind.keys[key])}")
        elif key == "on-error":
            on_error = OnError(value)
    return speed, on_error


def progress(job: Job | None) -> dict[str, str | int | float | None]:
    """State and figures of a job by the names of the job file; of no job, state ``none``."""
    if job is None:
        zeros = dict.fromkeys(("offset", "length", "percent", "rate", "speed"), 0)
        return {"state": State.NONE.value, **zeros, "eta": None, "error": ""}
    return {
        "state": job.state.value,
        "offset": job.offset,
        "length": job.length,
        "percent": round(job.percent, 1),
        "rate": job.rate,
        "speed": job.speed,
        "eta": job.eta,
        "error": job.error,
    }

"""The jobs of one disk, as commands start and steer them: ``start speed=1M``, ``pause``, ``speed=0``, …"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import trio

from cowfs.block.disk import Disk
from cowfs.block.layer import Layer
from cowfs.errors import Busy, CowfsError, NotFound, UsageError
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.chain import PLAIN, Opening, Vet
from cowfs.formats.merged import mark_merged
from cowfs.jobs.changes import Changes
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import Job, OnError, State
from cowfs.jobs.journal import Entry, Recorded, find_journal, journal_of, layer_name, remove_journal
from cowfs.jobs.plan import Plan, arguments_of, plan_of
from cowfs.jobs.stream import Stream
from cowfs.jobs.trace import load_trace
from cowfs.units import parse_size

log = logging.getLogger(__name__)


class Neighbour(NamedTuple):
    """Another disk of the same mount, and what the user calls it."""

    name: str
    disk: Disk


class Key(NamedTuple):
    """One key of ``start``: the argument of the job that it gives, and its values as the manual lists them.

    ``read`` makes the argument, from key and value and the layers of the chain.
    """

    argument: str
    values: Sequence[str]
    read: Callable[[str, str, Sequence[Layer]], object]


def _read_size(key: str, text: str, layers: Sequence[Layer]) -> int:
    return parse_size(text)


def _read_layer(key: str, text: str, layers: Sequence[Layer]) -> Layer:
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{key}={text}: '{text}' is not the number of a layer")
    if len(text) > 9 or int(text) >= len(layers):
        raise NotFound(f"{key}={text}: there is no such layer; the chain has 0, the deepest, to {len(layers) - 1}")
    return layers[len(layers) - 1 - int(text)]


def _read_text(key: str, text: str, layers: Sequence[Layer]) -> object:
    return text


def _word_key(argument: str, values: type[OnError] | type[Pivot] | type[BackingNames]) -> Key:
    """Return a key that takes one of a few words."""
    words = [value.value for value in values]

    def read(key: str, text: str, layers: Sequence[Layer]) -> object:
        if text not in words:
            raise UsageError(f"{key}={text} is not one of {', '.join(words)}")
        return values(text)

    return Key(argument, words, read)


_COMMON = {
    "speed": Key("speed", ("BYTES_PER_SECOND",), _read_size),
    "on-error": _word_key("on_error", OnError),
    "backing-names": _word_key("names", BackingNames),
}


class Kind(NamedTuple):
    """One kind of job, and the keys of its ``start``; others are refused."""

    make: Callable[..., Job]
    keys: Mapping[str, Key]


KINDS: dict[str, Kind] = {
    "stream": Kind(
        Stream, {"base": Key("base", ("N",), _read_layer), "trace": Key("trace", ("FILE",), _read_text), **_COMMON}
    ),
    "commit": Kind(
        Commit,
        {
            "top": Key("top", ("N",), _read_layer),
            "base": Key("base", ("N",), _read_layer),
            "pivot": _word_key("pivot", Pivot),
            **_COMMON,
        },
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
        #: the last started is the last
        self.jobs: dict[str, Job] = {}
        self._kept_out: str | None = None
        #: looks at names of files that commands have in them
        self.vet: Vet | None = None
        #: what jobs do about names that are not told otherwise
        self.names = BackingNames.KEEP
        # of the last job; its plan; what keeps the journals of successive jobs apart
        self._recorded: Recorded | None = None
        self._plan: Plan | None = None
        self._journal_lock = trio.Lock()
        #: changes of state, for each kind of job
        self.changes = {verb: Changes() for verb in KINDS}
        #: called at every change of any job's state
        self.on_change: Callable[[], None] = lambda: None

    @property
    def active(self) -> Job | None:
        """The job that goes on, or is about to."""
        return next((job for job in self.jobs.values() if job.state.is_active or job.state is State.NONE), None)

    @property
    def claimed(self) -> Sequence[Layer]:
        """Layers that the active job writes to or makes worth nothing, but for the active one."""
        return self._plan.claimed if self._plan is not None and self.active is not None else ()

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

        Raises `UsageError` for words that are not understood or do not fit the job's state, `NotFound` for a layer
        that is not there, `Busy` for a conflict, `ReadOnly`.
        """
        words = text.split()
        name = words[0].partition("=")[0] if words else ""
        if name == "start" and words[0] == name:
            arguments = {"names": self.names, **parse_keys(verb, words[1:], self._disk.layers)}
            if "trace" in arguments:
                arguments["trace"] = await load_trace(arguments["trace"], self.vet)
            await self._begin(verb, arguments)
        elif len(words) != 1 or name not in COMMANDS or (name == "speed") != ("=" in words[0]):
            raise UsageError(f"'{text}' is no command; {verb} takes start, pause, resume, cancel, complete, speed=N")
        else:
            await self._steer(verb, name, words[0].partition("=")[2])

    async def _steer(self, verb: str, name: str, value: str) -> None:
        """Tell the job, and its journal; what it is told is still in force after a restart."""
        job, recorded = self.jobs.get(verb), self._recorded
        if job is None or job is not self.active or recorded is None:
            raise UsageError(f"no {verb} job is active, so there is nothing to {name}")
        await recorded.begun.wait()
        if name == "speed":
            job.set_speed(parse_size(value))
            await recorded.change(speed=job.speed)
        elif name == "cancel":
            job.cancel()
            await recorded.over.wait()
        elif name == "complete":
            job.complete()
            await recorded.change(pivot=Pivot.YES.value)
        else:
            {"pause": job.pause, "resume": job.resume}[name]()
            await recorded.change(paused=name == "pause")

    async def _begin(self, verb: str, arguments: Mapping[str, Any], found: Entry | None = None) -> None:
        """Start a job, anew or from the journal that was ``found``; returns once it has a state."""
        self._require_none()
        disk = self._disk
        disk.layers[0].require_writable()
        job = KINDS[verb].make(disk, **arguments)
        with self.kept_out(f"a {verb} job is about to start"):
            await job.require_harmless()
        plan = plan_of(verb, disk.layers, arguments)
        self._refuse_sharing(plan)
        self._plan = plan
        self._recorded = recorded = Recorded(job, disk.layers[0], plan.describe, self._journal_lock, found)
        job.on_change = partial(self._changed, verb, recorded)
        self.jobs.pop(verb, None)
        self.jobs[verb] = job
        self._nursery.start_soon(recorded.run)
        # whoever gave the command reads the job file next
        await recorded.begun.wait()

    def _changed(self, verb: str, recorded: Recorded) -> None:
        # of this job, not of one that has taken its place while its journal was still there
        recorded.begun.set()
        self.changes[verb].happened()
        self.on_change()

    def _refuse_sharing(self, plan: Plan) -> None:
        """What a job writes to or makes worth nothing must be nobody else's layer."""
        for layer in plan.claimed:
            changed = {storage.identity for storage in layer.storages}
            for name, disk in self._neighbours():
                if any(storage.identity in changed for other in disk.layers for storage in other.storages):
                    raise Busy(f"its backing file {layer.name} is in use by '{name}'")

    # -- after a restart

    async def take_up(self, *, wanted: bool, opening: Opening = PLAIN) -> None:
        """Go on with the job that the journal tells of, if there is one, it is ``wanted``, and the disk can be written.

        Raises `CowfsError` if that cannot be done; the journal stays where it is, unless its chain is another one.
        """
        path, entry = await trio.to_thread.run_sync(find_journal, self._disk.layers[0])
        if entry is None:
            return
        if not wanted or self._disk.read_only:
            why = "jobs are not to be resumed" if not wanted else "the disk can only be read"
            log.warning("%s: the %s job that was broken off does not go on, since %s", path, entry.verb, why)
            return
        names = await trio.to_thread.run_sync(lambda: [layer_name(layer) for layer in self._disk.layers])
        if entry.is_relinked(names):
            await _mark(entry, opening)
            if entry.above is not None:
                await trio.to_thread.run_sync(remove_journal, path)
                log.info("%s: the %s job was done, but for marks in the files that it has merged", path, entry.verb)
                return
        elif not entry.fits(names):
            await trio.to_thread.run_sync(remove_journal, path)
            raise CowfsError(f"the chain is not the one any more on which a {entry.verb} job was running", file=path)
        arguments = arguments_of(entry, dict(zip(names, self._disk.layers, strict=True)))
        if entry.trace is not None:
            try:
                arguments["trace"] = await load_trace(entry.trace, opening.vet)
            except CowfsError as error:
                log.warning("the stream job goes on in the disk's own order: %s", error)
        await self._begin(entry.verb, arguments, entry)
        log.info("%s: the %s job goes on", path, entry.verb)

    async def drop_journal(self, layer: Layer) -> None:
        """Take away what tells of a job on a layer that is not the active one any more; a failure is logged."""
        path = await trio.to_thread.run_sync(journal_of, layer)
        if path is not None:
            try:
                await trio.to_thread.run_sync(remove_journal, path)
            except CowfsError as error:
                log.error("%s", error)


async def _mark(entry: Entry, opening: Opening) -> None:
    """Mark what a commit has taken out of the chain as merged; a failure is logged."""
    for layer in entry.between:
        try:
            await mark_merged(layer.name, layer.format, entry.base or "", opening)
        except CowfsError as error:
            # nothing depends on it, and its owner may have removed it
            log.error("could not be marked as merged, and must not be used: %s", error)


def parse_keys(verb: str, words: Sequence[str], layers: Sequence[Layer]) -> dict[str, Any]:
    """Read the words after ``start`` as arguments of a job. Raises `UsageError` or `NotFound`."""
    keys = KINDS[verb].keys
    arguments: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or name not in keys:
            raise UsageError(f"{verb} has no key '{name}'; it takes {', '.join(sorted(keys))}")
        arguments[keys[name].argument] = keys[name].read(name, value, layers)
    return arguments


def progress(job: Job | None) -> dict[str, str | int | float | None]:
    """State and figures of a job by the names of the job file; of no job, state ``none``."""
    if job is None:
        zeros = dict.fromkeys(("offset", "length", "percent", "rate", "speed"), 0)
        return {"state": State.NONE.value, **zeros, "eta": None, "pause": 0, "resumes": "no", "error": ""}
    return {
        "state": job.state.value,
        "offset": job.offset,
        "length": job.length,
        "percent": round(job.percent, 1),
        "rate": job.rate,
        "speed": job.speed,
        "eta": job.eta,
        "pause": round(job.longest_pause, 6),
        "resumes": "yes" if job.resumes else "no",
        "error": job.error,
    }

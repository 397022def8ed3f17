"""What a job has to do with which layers: checked before it starts, and told to its journal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from cowfs.block.layer import Layer
from cowfs.errors import CowfsError
from cowfs.formats.backingnames import BackingNames
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import OnError
from cowfs.jobs.journal import Entry, Merged, find_journal, layer_name, remove_journal
from cowfs.jobs.stream import Stream


@dataclass(frozen=True)
class Plan:
    """A job on a chain as it is when the job starts; names as in `Entry`. ``arguments`` are the job's own."""

    verb: str
    arguments: Mapping[str, Any]
    active: Layer
    top: Layer | None = None
    base: Layer | None = None
    above: Layer | None = None
    merged: Sequence[Layer] = ()

    @property
    def claimed(self) -> Sequence[Layer]:
        """Layers other than the active one that the job writes to, or makes worth nothing."""
        if self.verb != "commit":
            return ()
        layers = (self.above, *self.merged, self.base)
        return [layer for layer in layers if layer is not None and layer is not self.active]

    def describe(self) -> Entry:
        """Return what the journal of the job says. Blocks."""
        return Entry(
            verb=self.verb,
            file=layer_name(self.active),
            speed=self.arguments.get("speed", 0),
            on_error=self.arguments.get("on_error", OnError.REPORT).value,
            names=self.arguments.get("names", BackingNames.KEEP).value,
            pivot=self.arguments.get("pivot", Pivot.NO).value if self.verb == "commit" else None,
            merged=tuple(Merged(layer.format, layer_name(layer)) for layer in self.merged),
            base=_name(self.base),
            top=_name(self.top),
            above=_name(self.above),
            trace=self.arguments["trace"].path if "trace" in self.arguments else None,
        )


def _name(layer: Layer | None) -> str | None:
    return None if layer is None else layer_name(layer)


def plan_of(verb: str, layers: Sequence[Layer], arguments: Mapping[str, Any]) -> Plan:
    """Work out what a job will do, with arguments that the job has accepted."""
    active = layers[0]
    if verb == "stream":
        return Plan(verb, arguments, active, base=arguments.get("base"))
    pivot = arguments.get("pivot", Pivot.NO)
    top = layers.index(arguments.get("top", active))
    base = layers.index(arguments.get("base", layers[top + 1]))
    first = top + 1 if not top and pivot is Pivot.NO else top
    return Plan(
        verb,
        arguments,
        active,
        top=layers[top],
        base=layers[base],
        above=layers[top - 1] if top else None,
        merged=layers[first:base],
    )


async def drop_done(job: Stream | Commit, plan: Plan) -> None:
    """Take away the journal of a job that has been done without it: the next mount would do that again.

    ``plan`` is the job's, from before it began. Raises `StorageError`.
    """
    if isinstance(job, Commit) and job.keeps:
        return
    done = await trio.to_thread.run_sync(plan.describe)
    try:
        path, entry = await trio.to_thread.run_sync(find_journal, plan.active)
    except CowfsError:
        # whatever it is, it is not that of this job, and the next mount says what is wrong with it
        return
    if entry is not None and entry.has_layers_of(done):
        await trio.to_thread.run_sync(remove_journal, path)


def plan_of_job(job: Stream | Commit) -> Plan:
    """Work out what a job will do that is made already, and has not begun."""
    if isinstance(job, Stream):
        arguments = {"base": job.base} if job.base is not None else {}
    else:
        arguments = dict(zip(("top", "base"), job.layers, strict=True))
    return plan_of(job.verb, job.disk.layers, arguments)


def arguments_of(entry: Entry, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Return the arguments of the job that a journal tells of; ``layers`` by the names that it uses."""
    arguments: dict[str, Any] = {
        "speed": entry.speed,
        "on_error": OnError(entry.on_error),
        "names": BackingNames(entry.names),
    }
    for key, name in (("base", entry.base), ("top", entry.top)):
        if name is not None:
            arguments[key] = layers[name]
    if entry.pivot is not None:
        arguments["pivot"] = Pivot(entry.pivot)
    return arguments

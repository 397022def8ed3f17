"""Jobs in a mount, as the commands start, follow and name them: all through the control files."""

import os
import select
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cowfs.cli.jobs import INTERVAL, outcome
from cowfs.cli.live import Live
from cowfs.cli.progress import Display, progress_display
from cowfs.cli.streams import tell
from cowfs.errors import NotFound, UsageError
from cowfs.formats.chain import named_files
from cowfs.jobs.job import State

#: exit code after Ctrl-C, as shells report it
INTERRUPTED = 130


def run_live(live: Live, verb: str, keys: Sequence[str], *, wait: bool, quiet: bool) -> int | None:
    """Start a job in a mount and follow it, see `follow`; the exit code."""
    live.command(verb, " ".join(["start", *keys]))
    return follow(live, verb, quiet=quiet) if wait else None


def follow(live: Live, verb: str, *, quiet: bool, until_ready: bool = True) -> int | None:
    """Show a job until it has ended, or waits for somebody; the exit code.

    Ctrl-C ends the command and not the job. A job that is ready ends the command too, unless told otherwise:
    it has been told to complete.
    """
    try:
        with progress_display(verb, quiet=quiet) as display:
            facts = _watch(live, verb, display, until_ready=until_ready)
    except KeyboardInterrupt:
        tell(_steering(live, verb))
        return INTERRUPTED
    if facts["state"] == State.READY.value:
        if not quiet:
            ready = f"The {verb} job is ready, and goes on with what is written"
            tell(f"{ready}; have it finish with 'cowfs job {live.path} complete', end it with 'cancel'.")
        return None
    return outcome(verb, facts, live.path)


def _steering(live: Live, verb: str) -> str:
    job = f"cowfs job {live.path}"
    steer = f"steer it with '{job} pause|resume|speed=SIZE', end it with '{job} cancel'"
    return f"The {verb} job goes on; watch it with '{job} wait', {steer}."


def _watch(live: Live, verb: str, display: Display, *, until_ready: bool) -> dict[str, str]:
    """Show a job until it asks for nothing but waiting, looking again at every change of state and now and then."""
    with open(live.control(verb), "rb", buffering=0) as file:
        poll = select.poll()
        poll.register(file, select.POLLPRI)
        while True:
            text = os.pread(file.fileno(), 1 << 16, 0).decode(errors="surrogateescape")
            facts = dict(line.split(": ", 1) for line in text.splitlines())
            display.show(facts)
            if not is_active(facts) or (facts["state"] == State.READY.value and until_ready):
                return facts
            if facts["state"] == State.PAUSED.value and facts["error"]:
                return facts
            poll.poll(INTERVAL * 1000)


def is_active(facts: Mapping[str, Any]) -> bool:
    """Whether a job, by the figures of its file, goes on or can."""
    return State(facts["state"]).is_active


def known_jobs(status: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Jobs that a disk has or had, from its ``status.json``: verb and figures, active or else the last first."""
    jobs = [(verb, facts) for verb, facts in status["jobs"].items() if facts["state"] != State.NONE.value]
    yield from sorted(jobs, key=lambda job: not is_active(job[1]))


def active_job(live: Live) -> str:
    """Return the verb of the job that is active on a disk. Raises `UsageError` if none is."""
    for verb, facts in known_jobs(live.status()):
        if is_active(facts):
            return verb
    raise UsageError("no job is active on this disk", file=live.path)


def last_job(live: Live) -> str:
    """Return the verb of the job that is active on a disk, or was last. Raises `UsageError` if there was none."""
    for verb, _ in known_jobs(live.status()):
        return verb
    raise UsageError("no job has been started on this disk", file=live.path)


def layer_number(live: Live, text: str) -> int:
    """Return the number of the layer that a user means: its number, as in ``layers``, or its file.

    A relative name is meant from the directory of the image above it first, then from the current one. Raises
    `NotFound`.
    """
    files = [layer["file"] for layer in live.status()["chain"]]
    last = len(files) - 1
    if text.isascii() and text.isdecimal():
        if len(text) > 9 or int(text) > last:
            raise NotFound(f"there is no layer {text}; the chain has 0, the deepest, to {last}", file=live.path)
        return int(text)
    found = named_files(files, text)
    if not found:
        raise NotFound(f"there is no layer '{text}' in its chain", file=live.path)
    return last - found[0]

"""Showing how far a job is: a bar on a terminal, plain lines anywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

from cowfs.cli.streams import tell
from cowfs.units import format_size

#: seconds between plain lines
LINE_INTERVAL = 5.0


class Display(Protocol):
    """Takes a job's figures, by the names of the job file, as often as they are known."""

    def show(self, facts: dict[str, Any]) -> None:
        """Show them."""


class _Quiet:
    def show(self, facts: dict[str, Any]) -> None:
        """Nothing."""


class _Lines:
    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._next = monotonic() + LINE_INTERVAL
        self._state = ""

    def show(self, facts: dict[str, Any]) -> None:
        """Print a line when the state changes, and every few seconds; of a failure the error's line tells."""
        state = str(facts["state"])
        if state == "failed" or (state == self._state and monotonic() < self._next):
            return
        self._state, self._next = state, monotonic() + LINE_INTERVAL
        line = f"{self._verb}: {state}, {float(facts['percent']):.1f} % of {format_size(int(facts['length']))}"
        if int(facts["rate"]):
            line += f", {format_size(int(facts['rate']))}/s"
        if facts["eta"]:
            line += f", {facts['eta']} s left"
        tell(line)


class _Bar:
    def __init__(self, verb: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        self._verb = verb
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self.progress.add_task(verb, total=None, rate="", left="")

    def show(self, facts: dict[str, Any]) -> None:
        """Move the bar."""
        state = str(facts["state"])
        self.progress.update(
            self._task,
            description=self._verb if state == "running" else f"{self._verb} ({state})",
            completed=int(facts["offset"]),
            total=int(facts["length"]),
            rate=f"{format_size(int(facts['rate']))}/s",
            left=f"{facts['eta']} s left" if facts["eta"] else "",
        )


@contextmanager
def progress_display(verb: str, *, quiet: bool) -> Iterator[Display]:
    """Show a job while the context lasts, in the way that suits standard output."""
    if quiet:
        yield _Quiet()
    elif sys.stdout.isatty():
        bar = _Bar(verb)
        with bar.progress:
            yield bar
    else:
        yield _Lines(verb)

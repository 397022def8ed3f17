"""Showing how far a command is that was asked for it with ``-p``."""

import sys

from cowfs.cli.streams import tell


class Meter:
    """A bar on a terminal; anywhere else the way of ``qemu-img -p``, a whole percent at a time."""

    def __init__(self, verb: str, *, shown: bool) -> None:
        self._shown = shown
        self._last = -1
        self._bar = _Bar(verb) if shown and sys.stdout.isatty() else None

    def show(self, done: int, total: int) -> None:
        """Say how much of a total is done, in any unit."""
        percent = 100 * done // total if total else 100
        if not self._shown or percent == self._last:
            return
        self._last = percent
        if self._bar is not None:
            self._bar.show(percent)
        else:
            tell(f"    ({percent}.00/100%)\r", newline=False)

    def end(self) -> None:
        """Go on to the next line."""
        if self._bar is not None:
            self._bar.end()
        elif self._shown:
            tell()


class _Bar:
    def __init__(self, verb: str) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task(verb, total=100)
        self._progress.start()

    def show(self, percent: int) -> None:
        self._progress.update(self._task, completed=percent)

    def end(self) -> None:
        self._progress.stop()

"""What the files of the jobs have in common."""

from functools import partial

from cowfs.fuse.control.file import ControlFile, key_values
from cowfs.fuse.images import Served
from cowfs.jobs.control import COMMANDS, progress


async def _render(verb: str, served: Served) -> str:
    return key_values(progress(served.jobs.jobs.get(verb)))


async def _command(verb: str, served: Served, text: str) -> None:
    await served.jobs.command(verb, text)


def job_file(verb: str, summary: str) -> ControlFile[Served]:
    """Return the control file of one kind of job."""
    return ControlFile(
        verb,
        summary,
        partial(_render, verb),
        partial(_command, verb),
        COMMANDS,
        lambda served: served.jobs.changes[verb],
    )

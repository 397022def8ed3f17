"""Running a job from the command line on an image of no mount, and what all commands for jobs share."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import click
import trio

from cowfs.block.disk import Disk
from cowfs.cli.progress import Display, progress_display
from cowfs.errors import CowfsError, UsageError
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.chain import open_disk
from cowfs.jobs.commit import Commit
from cowfs.jobs.control import progress
from cowfs.jobs.job import Job, OnError, State
from cowfs.jobs.plan import drop_done, plan_of_job
from cowfs.jobs.stream import Stream
from cowfs.storage.nursery import side_by_side

#: seconds between two looks at a job that goes on
INTERVAL = 0.5

on_error_option = click.option(
    "--on-error",
    type=click.Choice([policy.value for policy in OnError]),
    default=OnError.REPORT.value,
    help="What an error does to the job: end it, pause it until it is resumed, or nothing until all else is done.",
)

backing_names_option = click.option(
    "--backing-names",
    "names",
    type=click.Choice([names.value for names in BackingNames]),
    default=None,
    help="Whether a backing file is recorded by a relative or an absolute name; as those that it replaces by default.",
)


def offline_policy(file: str, text: str) -> OnError:
    """Return what a job on an image file does about errors. Raises `UsageError` for one that nobody could resume."""
    if text == OnError.STOP.value:
        raise UsageError("--on-error stop needs a disk of a mount, where the job can be resumed", file=file)
    return OnError(text)


def run_offline(file: str, format: str | None, make: Callable[[Disk], Stream | Commit], *, quiet: bool) -> int | None:
    """Open a chain, run a job on it, close it. ``make`` may refuse, by raising, what the chain is not fit for."""
    # what goes wrong is said here, in one line; without a handler the log would say it too
    logging.getLogger("cowfs").addHandler(logging.NullHandler())
    return trio.run(_run_offline, file, format, make, quiet)


async def _run_offline(
    file: str, format: str | None, make: Callable[[Disk], Stream | Commit], quiet: bool
) -> int | None:
    disk = await open_disk(file, format, writable=True, copy_on_read=False)
    try:
        job = make(disk)
        plan = plan_of_job(job)
        await job.require_harmless()
        with progress_display(job.verb, quiet=quiet) as display:
            async with side_by_side() as nursery:
                nursery.start_soon(_watch, job, display)
                await job.run()
                nursery.cancel_scope.cancel()
            display.show(progress(job))
        if job.state is State.COMPLETED:
            await drop_done(job, plan)
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()
    return outcome(job.verb, progress(job), file)


async def _watch(job: Job, display: Display) -> None:
    while True:
        await trio.sleep(INTERVAL)
        display.show(progress(job))


def outcome(verb: str, facts: Mapping[str, Any], file: str) -> int | None:
    """Return the exit code of a job that has ended, None for 0. Raises why it did not do its work."""
    if facts["state"] == State.COMPLETED.value:
        return None
    if facts["state"] == State.PAUSED.value:
        raise CowfsError(f"the {verb} job is paused until it is resumed: {facts['error']}", file=file)
    if facts["state"] == State.CANCELLED.value:
        raise CowfsError(f"the {verb} job was cancelled", file=file)
    raise CowfsError(f"the {verb} job failed: {facts['error'].removeprefix(f'{file}: ')}", file=file)

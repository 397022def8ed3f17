"""``cowfs job``: watch and steer the jobs of mounted disks."""

import json
import os
from collections.abc import Sequence
from typing import Any

import click

from cowfs.cli.live import Live, mount_points, read_mount, require_live
from cowfs.cli.livejobs import active_job, follow, is_active, known_jobs, last_job
from cowfs.cli.options import output_options, parse_size_for, quiet_option
from cowfs.errors import UsageError
from cowfs.fuse.control.file import key_values, one_line
from cowfs.fuse.mounts import resolve
from cowfs.units import format_size

_PLAIN = ("pause", "resume", "cancel")
_ACTIONS = ("show", *_PLAIN, "complete", "wait", "speed=SIZE")

#: name of the disk, verb, figures
Job = tuple[str, str, dict[str, Any]]


@click.command()
@output_options
@quiet_option
@click.argument("path", metavar="MOUNT/NAME|MOUNTPOINT")
@click.argument("action", metavar="[show|pause|resume|cancel|complete|wait|speed=SIZE]", default="show")
def command(path: str, action: str, output: str, quiet: bool) -> int | None:
    """Show or steer the job that is active on a disk of a mount, whatever kind of job it is.

    show (the default) prints all that is known of it, or of the last ones if none is active. pause, resume and
    cancel do that; what a job has done stays done. speed=SIZE limits the bytes a second that it copies, 0 lifts
    the limit. wait shows its progress until it has ended, or is ready, or stopped at an error; its outcome is
    that of the command. If none is active, it is that of the last one. complete tells a job that is ready to
    finish, and waits for that.

    Given a MOUNTPOINT, the jobs of all disks are listed.

    \b
    Examples:
      cowfs job /mnt/disks
      cowfs job /mnt/disks/vm1
      cowfs job /mnt/disks/vm1 speed=20M
      cowfs job /mnt/disks/vm1 wait
    """
    if (where := _mount_point(path)) is not None:
        if action != "show":
            raise UsageError(f"name the disk whose job is meant to {action}, as MOUNTPOINT/NAME", file=path)
        images = read_mount(where)["images"]
        jobs = [(image["name"], verb, facts) for image in images for verb, facts in known_jobs(image)]
        _show(jobs, output, table=True)
        return None
    if not action.startswith("speed=") and action not in _ACTIONS[:-1]:
        raise UsageError(f"'{action}' is not one of {', '.join(_ACTIONS)}", file=path)
    live = require_live(path)
    if action == "show":
        _show([(live.name, verb, facts) for verb, facts in known_jobs(live.status())], output, table=False)
        return None
    return _steer(live, action, quiet=quiet)


def _mount_point(path: str) -> str | None:
    points = mount_points()
    if (where := resolve(path)) in points:
        return where
    # a path in a mount is asked for its target by nobody: the server may be dead
    if any(where.startswith(f"{point}/") for point in points):
        return None
    return real if (real := os.path.realpath(path)) in points else None


def _steer(live: Live, action: str, *, quiet: bool) -> int | None:
    if action == "wait":
        # it may be over by now
        return follow(live, last_job(live), quiet=quiet)
    verb = active_job(live)
    if action.startswith("speed="):
        live.command(verb, f"speed={parse_size_for(live.path, action.removeprefix('speed='))}")
        return None
    live.command(verb, action)
    return follow(live, verb, quiet=quiet, until_ready=False) if action == "complete" else None


def _show(jobs: Sequence[Job], output: str, *, table: bool) -> None:
    if output == "json":
        click.echo(json.dumps([{"name": name, "job": verb, **facts} for name, verb, facts in jobs], indent=4))
    elif table:
        rows = [("NAME", "JOB", "STATE", "DONE", "OF", "RATE", "LEFT", "ERROR"), *map(_row, jobs)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            click.echo("  ".join(cells).rstrip())
    else:
        # of several, those that have ended are history
        shown = [job for job in jobs if is_active(job[2])] or jobs
        texts = [key_values({"job": verb, **facts}) for _, verb, facts in shown]
        click.echo("\n".join(texts or [key_values({"job": "none"})]), nl=False)


def _row(job: Job) -> tuple[str, ...]:
    name, verb, facts = job
    rate = f"{format_size(facts['rate'])}/s" if facts["rate"] else ""
    left = "" if facts["eta"] is None else f"{facts['eta']} s"
    done, length = f"{facts['percent']} %", format_size(facts["length"])
    return one_line(name), verb, facts["state"], done, length, rate, left, one_line(facts["error"])

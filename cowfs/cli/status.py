"""``cowfs status``: show what is mounted."""

import json
from typing import Any

import click

from cowfs.cli.live import mount_points, read_mount, require_mount
from cowfs.cli.options import output_options
from cowfs.errors import CowfsError
from cowfs.units import format_size


@click.command()
@output_options
@click.argument("mount_point", metavar="[MOUNTPOINT]", required=False)
def command(mount_point: str | None, output: str) -> None:
    """Show all cowfs mounts, or one: their disks, the chains of these, and the jobs.

    \b
    Examples:
      cowfs status
      cowfs status --json /mnt/disks
    """
    points = mount_points() if mount_point is None else [require_mount(mount_point)]
    mounts = [_facts(point, must_answer=mount_point is not None) for point in dict.fromkeys(points)]
    if output == "json":
        click.echo(json.dumps(mounts if mount_point is None else mounts[0], indent=4))
    else:
        for facts in mounts:
            click.echo("\n".join(_lines(facts)))


def _facts(point: str, *, must_answer: bool) -> dict[str, Any]:
    try:
        return read_mount(point)
    except CowfsError as error:
        if must_answer:
            raise
        return {"mount-point": point, "error": error.message}


def _lines(facts: dict[str, Any]) -> list[str]:
    if "error" in facts:
        return [f"{facts['mount-point']}: {facts['error']}"]
    lines = [f"{facts['mount-point']}: server {facts['pid']}, version {facts['version']}"]
    for image in facts["images"]:
        access = ", read-only" if image["read-only"] else ""
        lines.append(f"  {image['name']}: {format_size(image['size'])} ({image['size']} bytes){access}")
        lines += [f"    {layer['index']}  {layer['format']:<6} {layer['file']}" for layer in image["chain"]]
        lines += [f"    {_job_line(verb, job)}" for verb, job in image["jobs"].items() if job["state"] != "none"]
    return lines


def _job_line(verb: str, job: dict[str, Any]) -> str:
    line = f"{verb}: {job['state']}, {job['percent']} %"
    if job["rate"]:
        line += f", {format_size(job['rate'])}/s"
    return f"{line}: {job['error']}" if job["error"] else line

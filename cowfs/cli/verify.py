"""``cowfs verify``: tell whether the backing files of an image are what they were."""

import click
import trio

from cowfs.cli.meter import Meter
from cowfs.cli.options import file_argument, format_option, quiet_option
from cowfs.formats.verify import Finding, verify

#: exit code for a backing file that has changed
CHANGED = 1


@click.command()
@format_option
@click.option("--accept", is_flag=True, help="Take the backing files for what they should be, from now on.")
@click.option("-p", "--progress", is_flag=True, help="Show how far it is.")
@quiet_option
@file_argument
def command(file: str, format: str | None, accept: bool, progress: bool, quiet: bool) -> int:
    """Tell whether all backing files of the image FILE are what they were when the images were put on them.

    An image remembers size, modification time and samples of its backing file, and where that has changed, it is
    not opened. This command reads every byte. With --accept, all images of the chain remember their backing files
    as they are now, with a digest of all bytes, which the command compares the next time.

    \b
    Exit codes:
      0  nothing is known to have changed, or what has is accepted
      1  something has changed
      2  it could not be told

    \b
    Examples:
      cowfs verify vm1.qcow2
      cowfs verify --accept copied-to-here.qcow2
    """
    meter = Meter("verify", shown=progress and not quiet)
    try:
        findings = trio.run(lambda: verify(file, format, meter.show, accept=accept))
    finally:
        meter.end()
    if not quiet:
        for finding in findings:
            click.echo(f"{finding.image}: {_verdict(finding, accept)}")
        if not findings:
            click.echo(f"{file}: has no backing file")
    return CHANGED if not accept and any(finding.difference for finding in findings) else 0


def _verdict(finding: Finding, accept: bool) -> str:
    if finding.difference is not None:
        end = "; accepted" if accept else ""
        return f"backing file {finding.backing} has changed: {finding.difference}{end}"
    if not finding.known:
        return f"backing file {finding.backing} is {'accepted' if accept else 'not remembered'}"
    if finding.compared:
        return f"backing file {finding.backing} is the same, every byte"
    return f"backing file {finding.backing} is the same by size, time and samples" + (
        ", and accepted" if accept else "; no digest of all bytes is remembered (--accept takes one)"
    )

"""``cowfs commit``: merge an image into its backing file."""

import click

from cowfs.cli.jobs import run_live, run_offline
from cowfs.cli.live import find_live
from cowfs.cli.options import parse_size_for, quiet_option
from cowfs.errors import UsageError


@click.command()
@click.option("-f", "--format", metavar="FMT", help="Format of an image FILE; told from its first bytes if not given.")
@click.option(
    "-r", "--speed", metavar="SIZE", default="0", help="Bytes a second that are copied at most; 0 is no limit."
)
@click.option("--no-wait", is_flag=True, help="Return at once; the job goes on in the mount.")
@click.option("-p", "--progress", is_flag=True, help="As in qemu-img; progress is shown anyway, unless -q is given.")
@quiet_option
@click.argument("file", metavar="MOUNT/NAME|FILE")
def command(file: str, format: str | None, speed: str, no_wait: bool, progress: bool, quiet: bool) -> int | None:
    """Write everything that an image holds into its backing file, and empty the image, which stays on top.

    No other overlay may stand on that backing file: its content changes. Given the flat file of a mount, this
    happens under whoever uses the disk. Ctrl-C leaves the job running; steer it through MOUNT/.cowfs/NAME/commit.
    Given an image file, which nothing else may use meanwhile, it is done here. Broken off at any moment, by
    whatever, the disk's content is whole, and a second run finishes the work.

    \b
    Examples:
      cowfs commit /mnt/disks/vm1
      cowfs commit overlay.qcow2
    """
    limit = parse_size_for(file, speed) or 0
    live = find_live(file)
    if live is not None:
        if format is not None:
            raise UsageError("--format is for image files; this disk is open already", file=file)
        return run_live(live, "commit", [f"speed={limit}"], wait=not no_wait, quiet=quiet)
    if no_wait:
        raise UsageError("--no-wait needs a disk of a mount, where the job can go on", file=file)
    code = run_offline(file, format, "commit", limit, quiet=quiet)
    if not quiet:
        click.echo("Image committed.")
    return code

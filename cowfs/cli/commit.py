"""``cowfs commit``: merge an image into its backing file."""

import click

from cowfs.block.disk import Disk
from cowfs.cli.jobs import backing_names_option, offline_policy, on_error_option, run_offline
from cowfs.cli.live import find_live
from cowfs.cli.livejobs import layer_number, run_live
from cowfs.cli.options import cache_option, parse_size_for, quiet_option
from cowfs.cli.streams import tell
from cowfs.errors import UsageError
from cowfs.formats.chain import find_layer
from cowfs.jobs.commit import Commit, Pivot


class _Command(click.Command):
    """Takes ``--pivot`` alone for ``--pivot=yes``; click would take the word behind it for the value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        words = [f"--pivot={Pivot.YES.value}" if word == "--pivot" else word for word in args[:end]]
        return super().parse_args(ctx, words + args[end:])


@click.command(cls=_Command)
@click.option("-f", "--format", metavar="FMT", help="Format of an image FILE; told from its first bytes if not given.")
@click.option("-b", "--base", metavar="BASE", help="Write into this backing file; of an image FILE, means -d too.")
@click.option(
    "--top", metavar="TOP", help="Write what this backing file of a mounted disk holds, not the active image."
)
@click.option(
    "--pivot",
    metavar="[=yes|no|wait]",
    type=click.Choice([pivot.value for pivot in Pivot]),
    default=None,
    help="Whether a mounted disk goes on in the base alone.",
)
@click.option("-d", "--keep", is_flag=True, help="Do not empty FILE.")
@click.option(
    "-r", "--speed", metavar="SIZE", default="0", help="Bytes a second that are copied at most; 0 is no limit."
)
@cache_option("-t", "--cache", "of the files")
@click.option("--no-wait", is_flag=True, help="Return at once; the job goes on in the mount.")
@click.option("-p", "--progress", is_flag=True, help="As in qemu-img; progress is shown anyway, unless -q is given.")
@backing_names_option
@on_error_option
@quiet_option
@click.argument("file", metavar="MOUNT/NAME|FILE")
def command(
    file: str,
    format: str | None,
    base: str | None,
    top: str | None,
    pivot: str | None,
    keep: bool,
    speed: str,
    no_wait: bool,
    names: str | None,
    on_error: str,
    progress: bool,
    quiet: bool,
) -> int | None:
    """Write everything that an image holds into its backing file, and empty the image, which stays on top.

    No other overlay may stand on that backing file: its content changes. Given the flat file of a mount, this
    happens under whoever uses the disk. Ctrl-C leaves the job running; 'cowfs job MOUNT/NAME' shows and steers it.
    Given an image file, which nothing else may use meanwhile, it is done here. Broken off at any moment, by
    whatever, the disk's content is whole, and a second run finishes the work.

    With -b, what all images above BASE hold is written into it. Given an image FILE, none of them is emptied. FILE
    holds what it did; what lies between it and BASE is worth nothing any more.

    For a mounted disk, BASE and TOP can also be the numbers that the layers have in MOUNT/.cowfs/NAME/chain. What
    lies between is taken out of the chain. With --top, the active image is left alone. With --pivot, it leaves the
    chain too, and the disk goes on in BASE; with --pivot=wait, not before 'cowfs job MOUNT/NAME complete'.

    \b
    Examples:
      cowfs commit /mnt/disks/vm1
      cowfs commit --top 2 --base 0 /mnt/disks/vm1
      cowfs commit --pivot /mnt/disks/vm1
      cowfs commit overlay.qcow2
      cowfs commit -b golden.qcow2 overlay.qcow2
    """
    limit = parse_size_for(file, speed) or 0
    live = find_live(file)
    if live is not None:
        _refuse(file, "is for image files; this disk is open already", {"--format": format, "--keep": keep})
        keys = [f"speed={limit}", f"on-error={on_error}"]
        keys += [
            f"{key}={layer_number(live, name)}" for key, name in (("top", top), ("base", base)) if name is not None
        ]
        keys += [] if pivot is None else [f"pivot={pivot}"]
        keys += [] if names is None else [f"backing-names={names}"]
        return run_live(live, "commit", keys, wait=not no_wait, quiet=quiet)
    _refuse(file, "is for disks of a mount", {"--top": top, "--pivot": pivot, "--backing-names": names})
    if no_wait:
        raise UsageError("--no-wait needs a disk of a mount, where the job can go on", file=file)

    policy = offline_policy(file, on_error)

    def make(disk: Disk) -> Commit:
        if len(disk.layers) == 1:
            raise UsageError("there is no backing file to commit into", file=file)
        depth = 1 if base is None else find_layer(disk.layers, base)
        kept = keep or base is not None
        return Commit(disk, speed=limit, on_error=policy, base=disk.layers[depth], keep=kept, alone=True)

    code = run_offline(file, format, make, quiet=quiet)
    if not quiet:
        tell("Image committed.")
    return code


def _refuse(file: str, reason: str, given: dict[str, object]) -> None:
    for option, value in given.items():
        if value:
            raise UsageError(f"{option} {reason}", file=file)

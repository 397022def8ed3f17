"""``cowfs stream``: copy what the backing files hold into the active image."""

from pathlib import Path

import click
import trio

from cowfs.block.disk import Disk
from cowfs.cli.jobs import backing_names_option, offline_policy, on_error_option, run_offline
from cowfs.cli.live import find_live
from cowfs.cli.livejobs import layer_number, run_live
from cowfs.cli.options import parse_size_for, quiet_option
from cowfs.errors import UsageError
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.chain import find_layer
from cowfs.jobs.stream import Stream
from cowfs.jobs.trace import load_trace


@click.command()
@click.option("-f", "--format", metavar="FMT", help="Format of an image FILE; told from its first bytes if not given.")
@click.option("-b", "--base", metavar="BASE", help="Leave this backing file, and what is below it, where they are.")
@click.option("--speed", metavar="SIZE", default="0", help="Bytes a second that are copied at most; 0 is no limit.")
@click.option("--no-wait", is_flag=True, help="Return at once; the job goes on in the mount.")
@click.option(
    "--trace", metavar="TRACE", help="A file that 'trace' in the control directory has recorded: its parts first."
)
@backing_names_option
@on_error_option
@quiet_option
@click.argument("file", metavar="MOUNT/NAME|FILE")
def command(
    file: str,
    format: str | None,
    base: str | None,
    speed: str,
    no_wait: bool,
    trace: str | None,
    names: str | None,
    on_error: str,
    quiet: bool,
) -> int | None:
    """Copy everything that an image takes from its backing files into the image itself, then let go of them.

    With -b, only what lies above BASE is copied, and BASE is the image's backing file then. BASE is written as the
    image above it records it, or as a path; of a mounted disk, also by its number in MOUNT/.cowfs/NAME/chain.

    Given the flat file of a mount, this happens under whoever uses the disk: nothing of it can be seen in the
    disk's content. Ctrl-C leaves the job running; 'cowfs job MOUNT/NAME' shows and steers it. Given an image
    file, which nothing else may use meanwhile, it is done here; a run that was broken off is taken up by the
    next.

    With --trace, what a machine read first when the trace was recorded is copied first.

    \b
    Examples:
      cowfs stream /mnt/disks/vm1
      cowfs stream --speed 50M --no-wait /mnt/disks/vm1
      cowfs stream --base 0 /mnt/disks/vm1
      cowfs stream overlay.qcow2
    """
    limit = parse_size_for(file, speed) or 0
    trace = None if trace is None else str(Path(trace).absolute())
    live = find_live(file)
    if live is None:
        if no_wait:
            raise UsageError("--no-wait needs a disk of a mount, where the job can go on", file=file)
        policy = offline_policy(file, on_error)
        first = None if trace is None else trio.run(load_trace, trace)

        def make(disk: Disk) -> Stream:
            kept = None if base is None else disk.layers[find_layer(disk.layers, base)]
            wanted = BackingNames(names or BackingNames.KEEP)
            return Stream(disk, base=kept, trace=first, names=wanted, alone=True, speed=limit, on_error=policy)

        return run_offline(file, format, make, quiet=quiet)
    if format is not None:
        raise UsageError("--format is for image files; this disk is open already", file=file)
    keys = [f"speed={limit}", f"on-error={on_error}"]
    if base is not None:
        keys.append(f"base={layer_number(live, base)}")
    keys += [] if names is None else [f"backing-names={names}"]
    if trace is not None:
        if trace.split() != [trace]:
            raise UsageError("has spaces in its name, which a job cannot be told of", file=trace)
        keys.append(f"trace={trace}")
    return run_live(live, "stream", keys, wait=not no_wait, quiet=quiet)

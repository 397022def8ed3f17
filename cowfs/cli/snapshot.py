"""``cowfs snapshot``: internal snapshots of an image."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import trio

from cowfs.block.image import Image
from cowfs.block.layer import Layer
from cowfs.block.snapshots import InternalSnapshot
from cowfs.cli.jobs import backing_names_option
from cowfs.cli.live import find_live
from cowfs.cli.options import file_argument, force_share_option, format_option, quiet_option
from cowfs.cli.snapshot_table import facts, table
from cowfs.errors import CowfsError, UsageError
from cowfs.formats.chain import Opening, open_image


@click.command()
@click.option("-l", "--list", "show", is_flag=True, help="List the snapshots; so does no option at all.")
@click.option(
    "-c",
    "--create",
    metavar="NAME",
    help="Keep the disk as it is now; in a mount, NAME is the file that goes on from there.",
)
@click.option("-a", "--apply", metavar="NAME", help="Make the disk what it was; an id counts before a name.")
@click.option("-d", "--delete", metavar="NAME", help="Forget a snapshot.")
@click.option(
    "--reuse-external", is_flag=True, help="Of a mounted disk: NAME is an empty overlay that was prepared for this."
)
@backing_names_option
@format_option
@force_share_option
@quiet_option
@file_argument
def command(
    file: str,
    show: bool,
    create: str | None,
    apply: str | None,
    delete: str | None,
    reuse_external: bool,
    names: str | None,
    format: str | None,
    opening: Opening,
    quiet: bool,
) -> None:
    """List, make, go back to and delete the snapshots that the image FILE keeps inside itself.

    Nothing else may use the image meanwhile. What is changed is changed at once: after a crash the image is as
    before or as after. Applying a snapshot forgets what the disk holds, and brings back the size it had. A
    snapshot can be mounted, to be read: see the mount option snapshot=NAME.

    Given the flat file of a mount, -c NAME makes a snapshot outside: NAME is a new qcow2 image, beside the active
    one unless it has a slash in it, which becomes the active layer. What was active before stays as it is. A block
    device is formatted; with --reuse-external, NAME is an overlay that was prepared for this.

    \b
    Examples:
      cowfs snapshot -c before-upgrade vm1.qcow2
      cowfs snapshot -c vm1-monday.qcow2 /mnt/disks/vm1
      cowfs snapshot -l vm1.qcow2
      cowfs snapshot -a before-upgrade vm1.qcow2
    """
    if show + sum(name is not None for name in (create, apply, delete)) > 1:
        raise click.UsageError("Cannot mix '-l', '-a', '-c', '-d'", click.get_current_context())
    live = find_live(file)
    if live is not None:
        if create is None or format is not None:
            raise UsageError(
                "is in use by a mount, where 'snapshot -c FILE' puts a new overlay on top;"
                " snapshots inside an image need its file to themselves",
                file=file,
            )
        # the server has a working directory of its own
        path = str(Path(create).absolute()) if "/" in create else create
        keys = [] if names is None else [f" backing-names={names}"]
        keys += [" reuse-external=yes"] if reuse_external else []
        live.command("snapshot", f"create {path}" + "".join(keys))
        return
    for option, value in {"--reuse-external": reuse_external, "--backing-names": names}.items():
        if value:
            raise UsageError(f"{option} is for disks of a mount", file=file)
    if create is not None:
        now = divmod(time.time_ns(), 1_000_000_000)
        trio.run(_change, file, format, lambda image: image.create_snapshot(create, now))
    elif apply is not None:
        trio.run(_change, file, format, lambda image: image.apply_snapshot(apply))
    elif delete is not None:
        trio.run(_change, file, format, lambda image: image.delete_snapshot(delete))
    elif lines := table(facts(trio.run(_list, file, format, opening))):
        click.echo("\n".join(lines))


async def _list(file: str, format: str | None, opening: Opening) -> list[InternalSnapshot]:
    image = await open_image(file, format, opening=opening)
    try:
        return await image.snapshots()
    finally:
        await image.close()


async def _change(file: str, format: str | None, change: Callable[[Image], Awaitable[None]]) -> None:
    image = await open_image(file, format, writable=True)
    try:
        Layer(image).require_writable()
        await change(image)
    except CowfsError as error:
        error.file = error.file or file
        raise
    finally:
        await image.close()

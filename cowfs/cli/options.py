"""Options that several commands have, so that they are the same everywhere."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cowfs.block.snapshots import SnapshotKey
from cowfs.errors import UsageError
from cowfs.formats.chain import Opening
from cowfs.units import parse_size

Function = TypeVar("Function", bound=Callable[..., Any])

file_argument = click.argument("file", metavar="FILE")

format_option = click.option(
    "-f", "--format", "format", metavar="FMT", help="Format of FILE; told from its first bytes if not given."
)

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")


snapshot_option = click.option(
    "-l",
    "--snapshot",
    "snapshot",
    metavar="SNAPSHOT",
    help="Take the disk of FILE as of an internal snapshot: ID, NAME, or snapshot.id=ID,snapshot.name=NAME.",
)


#: arrives as ``opening``: how the files are opened
force_share_option = click.option(
    "-U",
    "--force-share",
    "opening",
    is_flag=True,
    callback=lambda context, parameter, value: Opening(locking=not value, trusting=value, fleeting=True),
    help="Read although another program may be writing, or a backing file has changed: it may make no sense.",
)


def cache_option(short: str, long: str, of_what: str) -> Callable[[Function], Function]:
    """Add an option for a cache mode, which means nothing: cowfs always caches, and always flushes at the end."""
    modes = click.Choice(["none", "writeback", "writethrough", "directsync", "unsafe"])
    text = f"Cache mode {of_what}, as in qemu-img; taken, and means nothing."
    return click.option(short, long, type=modes, expose_value=False, help=text)


def output_options(function: Function) -> Function:
    """Add ``--output`` and ``--json``, which arrive as ``output``, "human" or "json"."""
    choice = click.option(
        "--output", type=click.Choice(["human", "json"]), default="human", help="For people, or for programs."
    )
    short = click.option("--json", "output", flag_value="json", help="The same as --output=json.")
    return choice(short(function))


def parse_snapshot_for(file: str, text: str | None) -> str | SnapshotKey | None:
    """Read what ``-l`` was given: an id or else a name, or both by their keys. Raises `UsageError`."""
    if text is None or not text.startswith("snapshot."):
        return text
    found: dict[str, str] = {}
    for word in text.split(","):
        key, sign, value = word.partition("=")
        if key not in ("snapshot.id", "snapshot.name") or not sign or key in found:
            raise UsageError(f"'{text}' is no snapshot; write snapshot.id=ID,snapshot.name=NAME", file=file)
        found[key] = value
    return SnapshotKey(found.get("snapshot.id"), found.get("snapshot.name"))


def parse_size_for(file: str, text: str | None) -> int | None:
    """Bytes that an option or argument stands for; errors name the file that it was given for."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except UsageError as error:
        error.file = file
        raise

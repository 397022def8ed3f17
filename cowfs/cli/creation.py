"""What the commands share that make images: creation options, backing files."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from cowfs.block.image import Backing
from cowfs.cli.live import find_live
from cowfs.errors import StorageError, UsageError
from cowfs.formats.registry import Format

creation_options = click.option(
    "-o", "--options", metavar="KEY=VALUE,…", multiple=True, help="Options of the format; '-o help' lists them."
)


def split_options(options: Sequence[str]) -> list[str]:
    """Cut what ``-o`` was given at single commas; a double one stands for a comma in a value."""
    return [word.replace(",,", ",") for text in options for word in re.split(r"(?<!,),(?:,,)*(?!,)", text)]


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether ``-o`` was given no options but a question."""
    return "help" in words or "?" in words


def parse_options(words: Sequence[str], file: str) -> dict[str, str]:
    """Return names and values; `UsageError` for a word that is no option."""
    options = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise UsageError(f"'{word}' is no option; write KEY=VALUE", file=file)
        options[name] = value
    return options


def take_backing(file: str, name: str | None, format: str | None, options: dict[str, str]) -> Backing | None:
    """Return the backing file that the options stand for, taking what ``-o`` says of it out."""
    names = [text for text in (name, options.pop("backing_file", None)) if text is not None]
    formats = [text for text in (format, options.pop("backing_fmt", None)) if text is not None]
    if len(set(names)) > 1 or len(set(formats)) > 1:
        raise UsageError("the backing file or its format is given twice", file=file)
    if formats and not names:
        raise UsageError("a backing format makes no sense without a backing file", file=file)
    return Backing(names[0], formats[0] if formats else None) if names else None


@contextmanager
def explaining_disks(file: str) -> Iterator[None]:
    """Say what there is to do if an image cannot be made since its file is to be one of a mount."""
    try:
        yield
    except StorageError as error:
        if error.errno != errno.EPERM or error.file != file:
            raise
        live = find_live(file)
        if live is None:
            raise
        raise UsageError(
            f"is a disk of the mount {live.mount_point}, and cannot be made anew; 'cowfs convert -n' writes into it",
            file=file,
        ) from error


def list_options(format: Format) -> None:
    """Print the creation options of a format."""
    click.echo(f"Supported {format.name} options:")
    for name, help in sorted(format.options.items()):
        click.echo(f"  {name:<22} - {help}")

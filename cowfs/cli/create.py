"""``cowfs create``: make a new image."""

import re
from collections.abc import Mapping
from functools import partial

import click
import trio

from cowfs.block.image import Backing
from cowfs.cli.options import parse_size_for, quiet_option
from cowfs.errors import UsageError
from cowfs.formats.create import create_image
from cowfs.formats.registry import Format, format_named


@click.command()
@click.option(
    "-f", "--format", "format", metavar="FMT", default="raw", help="Format of the new image; raw if not given."
)
@click.option(
    "-b", "--backing", metavar="BACKING", help="What the new image starts out as; it must not change any more."
)
@click.option("-F", "--backing-format", metavar="BFMT", help="Format of the backing file; -b needs it.")
@click.option("-u", "--unsafe", is_flag=True, help="Do not look at the backing file; it need not exist yet.")
@click.option(
    "-o", "--options", metavar="KEY=VALUE,…", multiple=True, help="Options of the format; '-o help' lists them."
)
@quiet_option
@click.argument("file", metavar="FILE", required=False)
@click.argument("size", metavar="[SIZE]", required=False)
def command(
    format: str,
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    options: tuple[str, ...],
    quiet: bool,
    file: str | None,
    size: str | None,
) -> None:
    """Make a new disk image FILE whose disk has SIZE bytes.

    SIZE takes the suffixes k, M, G, T, P and E (powers of 1024), and is the size of the backing file's disk if
    left out. A relative name of a backing file is meant from the directory of FILE, wherever the command is
    run. An existing FILE is replaced, but only once everything else is known to be right; if the command
    fails, no new file is left behind.

    \b
    Examples:
      cowfs create disk.raw 10G
      cowfs create -f qcow2 -b disk.raw -F raw overlay.qcow2
      cowfs create -f qcow2 -o cluster_size=128k,lazy_refcounts=on big.qcow2 1T
      cowfs create -f qcow2 -o help
    """
    words = [word for text in options for word in _split(text)]
    if "help" in words or "?" in words:
        _list_options(format_named(format))
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.", click.get_current_context())
    chosen = _parse(words, file)
    link = _backing(file, backing, backing_format, chosen)
    if size is not None and "size" in chosen:
        raise UsageError("the size is given twice", file=file)
    wanted = parse_size_for(file, chosen.pop("size", size))
    made = trio.run(partial(create_image, file, format, wanted, link, chosen, trust_backing=unsafe))
    if not quiet:
        click.echo(_summary(file, format, made, link, chosen))


def _split(text: str) -> list[str]:
    """Cut at single commas; a double one stands for a comma in a value."""
    return [word.replace(",,", ",") for word in re.split(r"(?<!,),(?:,,)*(?!,)", text)]


def _parse(words: list[str], file: str) -> dict[str, str]:
    options = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise UsageError(f"'{word}' is no option; write KEY=VALUE", file=file)
        options[name] = value
    return options


def _backing(file: str, name: str | None, format: str | None, options: dict[str, str]) -> Backing | None:
    """Return the backing file that the options stand for, taking what ``-o`` says of it out."""
    names = [text for text in (name, options.pop("backing_file", None)) if text is not None]
    formats = [text for text in (format, options.pop("backing_fmt", None)) if text is not None]
    if len(set(names)) > 1 or len(set(formats)) > 1:
        raise UsageError("the backing file or its format is given twice", file=file)
    if formats and not names:
        raise UsageError("a backing format makes no sense without a backing file", file=file)
    return Backing(names[0], formats[0] if formats else None) if names else None


def _list_options(format: Format) -> None:
    click.echo(f"Supported {format.name} options:")
    for name, help in sorted(format.options.items()):
        click.echo(f"  {name:<22} - {help}")


def _summary(file: str, format: str, size: int, backing: Backing | None, options: Mapping[str, str]) -> str:
    facts = {"fmt": format, "size": str(size)}
    if backing is not None:
        facts["backing_file"] = backing.name
        if backing.format is not None:
            facts["backing_fmt"] = backing.format
    return f"Formatting '{file}', " + " ".join(f"{key}={value}" for key, value in {**facts, **options}.items())

"""``cowfs check``: look for damage and leaks."""

import json

import click
import trio

from cowfs.block.check import CheckResult, Repair
from cowfs.block.image import Image
from cowfs.cli.options import (
    cache_option,
    file_argument,
    force_share_option,
    format_option,
    output_options,
    quiet_option,
)
from cowfs.cli.streams import tell
from cowfs.formats.chain import Opening, open_image

CORRUPT = 2
LEAKS = 3
NOT_SUPPORTED = 63


@click.command()
@format_option
@force_share_option
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="Put right what is wrong: leaks only, or all; then look once more.",
)
@cache_option("-T", "--source-cache", "of FILE")
@quiet_option
@output_options
@file_argument
def command(file: str, format: str | None, opening: Opening, repair: str | None, quiet: bool, output: str) -> int:
    """Look for damage and leaked space in the image FILE, without its backing files.

    Without -r nothing is changed. What is found, or repaired, is told on standard error, the sums on standard
    output.

    \b
    Exit codes:
      0   nothing is wrong
      1   the check could not be made
      2   the image is corrupt
      3   there are leaked clusters, which waste space but do no harm
      63  the format has nothing that could be checked

    \b
    Examples:
      cowfs check vm1.qcow2
      cowfs check --json vm1.qcow2
      cowfs check -r all vm1.qcow2
    """
    result = trio.run(_check, file, format, opening, Repair(repair or "none"))
    if result is None:
        tell(f"cowfs: {file}: this format has nothing that could be checked", err=True)
        return NOT_SUPPORTED
    image_format, found = result
    if not quiet:
        for message in found.messages:
            tell(message, err=True)
        if found.omitted:
            tell(f"... and {found.omitted} more", err=True)
    if output == "json":
        click.echo(json.dumps(_facts(file, image_format, found), indent=4))
    elif not quiet:
        click.echo(_summary(found), nl=False)
    return CORRUPT if found.corruptions else LEAKS if found.leaks else 0


async def _check(file: str, format: str | None, opening: Opening, repair: Repair) -> tuple[str, CheckResult] | None:
    """Return the image's format and what was found; None if its format has no check."""
    repairs = repair is not Repair.NONE
    image = await open_image(file, format, writable=repairs, for_repair=repairs, opening=opening)
    try:
        if type(image).check is Image.check:
            return None
        return image.format, await image.check(repair)
    finally:
        await image.close()


def _facts(file: str, format: str, found: CheckResult) -> dict[str, int | str]:
    """Return what ``qemu-img check --output=json`` says; it leaves out what is zero."""
    counts = {
        "image-end-offset": found.image_end_offset,
        "total-clusters": found.total_clusters,
        "allocated-clusters": found.allocated_clusters,
        "fragmented-clusters": found.fragmented_clusters,
        "compressed-clusters": found.compressed_clusters,
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        "corruptions-fixed": found.corruptions_fixed,
        "leaks-fixed": found.leaks_fixed,
    }
    return {
        **{key: count for key, count in counts.items() if count},
        "check-errors": 0,
        "filename": file,
        "format": format,
    }


def _summary(found: CheckResult) -> str:
    """Lay the sums out as ``qemu-img check`` does."""
    text = ""
    if found.corruptions_fixed or found.leaks_fixed:
        text += "The following inconsistencies were found and repaired:\n\n"
        text += f"    {found.leaks_fixed} leaked clusters\n    {found.corruptions_fixed} corruptions\n\n"
        text += "Double checking the fixed image now...\n"
    if not found.corruptions and not found.leaks:
        text += "No errors were found on the image.\n"
    if found.corruptions:
        text += f"\n{found.corruptions} errors were found on the image.\n"
        text += "Data may be corrupted, or further writes to the image may corrupt it.\n"
    if found.leaks:
        text += f"\n{found.leaks} leaked clusters were found on the image.\n"
        text += "This means waste of disk space, but no harm to data.\n"
    if found.total_clusters and found.allocated_clusters:
        allocated, total = found.allocated_clusters, found.total_clusters
        text += (
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * found.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * found.compressed_clusters / allocated:.2f}% compressed clusters\n"
        )
    if found.image_end_offset:
        text += f"Image end offset: {found.image_end_offset}\n"
    return text

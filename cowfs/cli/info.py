"""``cowfs info``: show what an image is."""

import json
from dataclasses import replace
from typing import Any

import click
import trio

from cowfs.block.alignment import align_up
from cowfs.block.image import Image
from cowfs.block.joined import SECTOR
from cowfs.cli.options import file_argument, force_share_option, format_option, output_options
from cowfs.cli.snapshot_table import facts as snapshot_facts
from cowfs.cli.snapshot_table import table
from cowfs.errors import CowfsError
from cowfs.formats.chain import Opening, backing_source, open_chain, open_image
from cowfs.storage import is_json_name, shown
from cowfs.units import format_size


@click.command()
@format_option
@force_share_option
@click.option("--backing-chain", is_flag=True, help="Go on with the backing file, the one below it, and so on.")
@output_options
@file_argument
def command(file: str, format: str | None, backing_chain: bool, opening: Opening, output: str) -> None:
    """Show what the image FILE is: format, sizes, features, backing file.

    Virtual size is what a guest sees, disk size what the file takes of the host's space.

    \b
    Examples:
      cowfs info vm1.qcow2
      cowfs info --backing-chain --json vm1.qcow2
    """
    facts = trio.run(_chain_facts if backing_chain else _image_facts, file, format, opening)
    if output == "json":
        click.echo(json.dumps(facts if backing_chain else facts[0], indent=4))
    else:
        click.echo("\n\n".join("\n".join(_lines(fact)) for fact in facts))


async def _image_facts(file: str, format: str | None, opening: Opening) -> list[dict[str, Any]]:
    image = await open_image(file, format, opening=opening)
    try:
        return [await _facts(image)]
    finally:
        await image.close()


async def _chain_facts(file: str, format: str | None, opening: Opening) -> list[dict[str, Any]]:
    # who wants to know why a backing file is refused gets an answer
    layers = await open_chain(file, format, opening=replace(opening, trusting=True))
    try:
        return [await _facts(layer.image) for layer in layers]
    finally:
        for layer in layers:
            await layer.close()


async def _facts(image: Image) -> dict[str, Any]:
    """Return what ``qemu-img info --output=json`` says of one image; raw ones too have whole sectors there."""
    name = image.storage.name
    snapshots = await image.snapshots()
    facts: dict[str, Any] = {"snapshots": snapshot_facts(snapshots)} if snapshots else {}
    facts |= {"virtual-size": align_up(image.size, SECTOR), "filename": name}
    if image.cluster_size > 1:
        facts["cluster-size"] = image.cluster_size
    facts["format"] = image.format
    if not image.storage.is_remote:
        facts["actual-size"] = image.storage.allocated
    if details := await image.details():
        facts["format-specific"] = {"type": image.format, "data": details}
    if image.backing is not None:
        facts["full-backing-filename"] = _full_name(image)
        facts["backing-filename"] = shown(image.backing.name)
        if image.backing.format is not None:
            facts["backing-filename-format"] = image.backing.format
    facts["dirty-flag"] = image.dirty
    return facts


def _full_name(image: Image) -> str:
    assert image.backing is not None
    if is_json_name(image.backing.name):
        # whole as it is, as with qemu-img
        return image.backing.name
    try:
        return backing_source(image.storage.name, image.backing).name
    except CowfsError:
        # shown all the same: it is what the header says
        return shown(image.backing.name)


def _lines(facts: dict[str, Any]) -> list[str]:
    """Lay one image's facts out as ``qemu-img info`` does."""
    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {format_size(facts['virtual-size'])} ({facts['virtual-size']} bytes)",
        f"disk size: {format_size(facts['actual-size']) if 'actual-size' in facts else 'unavailable'}",
    ]
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    if facts["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in facts:
        name, full = facts["backing-filename"], facts["full-backing-filename"]
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full != name else ""))
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {facts['backing-filename-format']}")
    lines += table(facts.get("snapshots", []))
    if "format-specific" in facts:
        lines.append("Format specific information:")
        lines += _detail_lines(facts["format-specific"]["data"], 1)
    return lines


def _detail_lines(data: dict[str, Any] | list[Any], depth: int) -> list[str]:
    """Lay out nested facts, four spaces a level."""
    pairs = data.items() if isinstance(data, dict) else [(f"[{index}]", value) for index, value in enumerate(data)]
    lines = []
    for key, value in pairs:
        label = "    " * depth + key.replace("-", " ") + ":"
        if isinstance(value, (dict, list)):
            lines += [label, *_detail_lines(value, depth + 1)]
        else:
            lines.append(f"{label} {str(value).lower() if isinstance(value, bool) else value}")
    return lines

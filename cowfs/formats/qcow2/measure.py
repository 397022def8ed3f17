"""How large a new qcow2 image would be, by the formulas of QEMU, which counts all metadata of a full image."""

from collections.abc import Mapping

from cowfs.block.alignment import align_up
from cowfs.block.disk import Disk
from cowfs.errors import CorruptImage
from cowfs.formats.measuring import Measured, data_runs, disk_size
from cowfs.formats.qcow2 import bitmaps
from cowfs.formats.qcow2.create import plan_header
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.layout import ENTRY_SIZE, metadata_size


async def measure(size: int, source: Disk | None, options: Mapping[str, str]) -> Measured:
    """Measure an image of ``size`` bytes, or one with the content of ``source``. Raises `UsageError` for options.

    Of an overlay nobody knows how much its backing file would share with it: it counts as full.
    """
    has_backing = "backing_file" in options
    chosen = {name: value for name, value in options.items() if name not in ("backing_file", "backing_fmt")}
    header, preallocation = plan_header(size, None, chosen)
    required = 0
    if source is not None:
        size = disk_size(source)
        if not has_backing:
            required = sum([end - start async for start, end in data_runs(source, header.cluster_size)])
    size = align_up(size, header.cluster_size)
    if preallocation in ("falloc", "full") or (source is not None and has_backing):
        required = size
    full = size + metadata_size(header, size)
    bitmaps = await _bitmaps(source, header.cluster_size) if header.version >= 3 and source else None
    return Measured(full - size + required, full, bitmaps)


async def _bitmaps(source: Disk, unit: int) -> int | None:
    """Bytes that copies of the source's bitmaps would take: section "Bitmaps extension"."""
    image = source.layers[0].image
    if not isinstance(image, Qcow2Image) or image.header.version < 3:
        return None
    place = bitmaps.locate(image.header)
    if place is None:
        return 0
    try:
        found = await bitmaps.read_bitmaps(image.storage, place)
    except CorruptImage as error:
        error.file = image.storage.name
        raise
    total = directory = 0
    for bitmap in found:
        if not bitmap.flags & bitmaps.IN_USE:
            bits = -(-image.size >> min(bitmap.granularity_bits, 63))
            clusters = -(-bits // (8 * unit))
            total += clusters * unit + align_up(clusters * ENTRY_SIZE, unit)
            directory += bitmaps.entry_size(len(bitmap.name))
    return total + align_up(directory, unit)

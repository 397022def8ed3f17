"""Telling a qcow2 file, and opening it."""

from cowfs.block.metacache import DEFAULT_BOUND, MIN_TABLES, MetadataCache
from cowfs.errors import CowfsError
from cowfs.formats.qcow2.datafile import ExternalDataImage, ExternalExtendedImage
from cowfs.formats.qcow2.extended import ExtendedImage
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.layout import MAGIC, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, parse_header
from cowfs.storage.base import Storage
from cowfs.storage.blockoptions import Check, is_size, is_switch, one_of

#: by whether guest data lies in a file of its own, and the words of an L2 entry
_KINDS = {
    (False, 1): Qcow2Image,
    (False, 2): ExtendedImage,
    (True, 1): ExternalDataImage,
    (True, 2): ExternalExtendedImage,
}

#: options of QEMU's driver about what it keeps in memory, checks, and passes on of discards; see `Format`
DEVICE_OPTIONS: dict[str, Check] = {
    **dict.fromkeys(
        ("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref"),
        is_switch,
    ),
    **dict.fromkeys(
        ("cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval"), is_size
    ),
    "overlap-check": one_of("none", "constant", "cached", "all"),
}


def probe(head: bytes) -> bool:
    """Whether a file that starts with these bytes says that it is qcow2."""
    return head.startswith(MAGIC)


async def open_image(storage: Storage, *, cache_size: int = DEFAULT_BOUND, for_repair: bool = False) -> Qcow2Image:
    """Read header, L1 and refcount table; repair the counts if the image is writable and was not closed cleanly.

    ``cache_size`` bounds the bytes of other tables that are kept. ``for_repair`` opens images too that cannot be
    written otherwise, changes nothing, and allows nothing but a check.
    Raises `InvalidImage`, `CorruptImage`, `Unsupported`.
    """
    try:
        head = await storage.read_bytes(0, min(storage.length, 1 << MIN_CLUSTER_BITS))
        bits = int.from_bytes(head[20:24], "big")
        if MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            head = await storage.read_bytes(0, min(storage.length, 1 << bits))
        header = parse_header(head, storage.length, for_repair=for_repair)
        kind = _KINDS[header.data_file is not None, header.entry_words]
        image = kind(
            storage,
            header,
            MetadataCache(storage, "big", bound=max(cache_size, MIN_TABLES << header.cluster_bits)),
            for_repair=for_repair,
        )
        await image.load(head)
        if not storage.read_only and not for_repair:
            await image.recover()
    except CowfsError as error:
        error.file = error.file or storage.name
        raise
    return image

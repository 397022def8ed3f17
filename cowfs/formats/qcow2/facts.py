"""What ``info`` says of a qcow2 image."""

from typing import Any

from cowfs.formats.qcow2 import bitmaps
from cowfs.formats.qcow2.layout import (
    AUTOCLEAR_RAW_DATA,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_TYPES,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_EXTENDED_L2,
    Header,
)
from cowfs.storage.base import Storage


async def describe(storage: Storage, header: Header) -> dict[str, Any]:
    """Return the facts of ``qemu-img info``, in its order. Raises `CorruptImage` for bitmaps that cannot be."""
    facts: dict[str, Any] = {"compat": "1.1" if header.version >= 3 else "0.10"}
    facts["compression-type"] = COMPRESSION_TYPES[header.compression_type]
    if header.version >= 3:
        facts["lazy-refcounts"] = bool(header.compatible & COMPATIBLE_LAZY_REFCOUNTS)
        if described := await bitmaps.describe(storage, header):
            facts["bitmaps"] = described
    facts["refcount-bits"] = 1 << header.refcount_order
    if header.data_file is not None:
        facts["data-file"] = header.data_file
        facts["data-file-raw"] = bool(header.autoclear & AUTOCLEAR_RAW_DATA)
    if header.version >= 3:
        facts["corrupt"] = bool(header.incompatible & INCOMPATIBLE_CORRUPT)
        facts["extended-l2"] = bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2)
    return facts

"""Making a new QED image."""

import os
from collections.abc import Mapping

from cowfs.block.alignment import align_up
from cowfs.block.image import Backing
from cowfs.errors import UsageError
from cowfs.formats.options import parse_power, refuse_unknown
from cowfs.formats.qed.layout import (
    HEADER_LENGTH,
    MAX_BACKING_NAME,
    MAX_CLUSTER_SIZE,
    MAX_TABLE_BYTES,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    SECTOR,
    Feature,
    Header,
)
from cowfs.storage.base import Storage

OPTIONS = {
    "size": "size of the disk in bytes, with an optional suffix",
    "backing_file": "file name of the backing image",
    "backing_fmt": "format of the backing image; only raw is recorded",
    "cluster_size": "cluster size, a power of two from 4K to 64M (default 64K)",
    "table_size": "clusters of an L1 or L2 table, a power of two from 2 to 16 (default 4)",
}

#: clusters; the specification allows 1 too, and cowfs reads it, but QEMU takes such a table's offset for invalid
MIN_NEW_TABLE_SIZE = 2


def encode_name(name: str) -> bytes:
    """Return the bytes of a backing file name; `UsageError` if no header can hold it."""
    encoded = os.fsencode(name)
    if not 0 < len(encoded) <= MAX_BACKING_NAME or b"\0" in encoded:
        raise UsageError(f"a backing file name must have from 1 to {MAX_BACKING_NAME} bytes")
    return encoded


def backing_features(backing: Backing) -> Feature:
    """Return the feature bits that an image with this backing file has."""
    return Feature.BACKING_FILE | (Feature.BACKING_IS_RAW if backing.format == "raw" else Feature(0))


def plan_header(size: int, backing: Backing | None, options: Mapping[str, str]) -> Header:
    """Header of a new image of ``size`` bytes, rounded up to sectors. Raises `UsageError`."""
    refuse_unknown("qed", options, OPTIONS)
    cluster_size = 1 << parse_power(options, "cluster_size", 1 << 16, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE)
    table_size = 1 << parse_power(options, "table_size", 4, MIN_NEW_TABLE_SIZE, MAX_TABLE_SIZE)
    header = Header(cluster_size, table_size, 1, 0, 0, 0, l1_offset=cluster_size, size=align_up(size, SECTOR))
    if header.table_bytes > MAX_TABLE_BYTES:
        raise UsageError(f"tables of {header.table_bytes} bytes are too large; choose a smaller table_size")
    if header.size > header.max_size:
        raise UsageError(
            f"a disk of {header.size} bytes does not fit: with cluster_size={cluster_size} and "
            f"table_size={table_size} it can have up to {header.max_size} bytes"
        )
    if backing is not None:
        length = len(encode_name(backing.name))
        header = header._replace(features=backing_features(backing), backing_offset=HEADER_LENGTH, backing_size=length)
    return header


async def create(storage: Storage, size: int, backing: Backing | None, options: Mapping[str, str]) -> None:
    """Fill an empty storage with a new image: a header and an empty L1 table.

    Raises `UsageError` before anything is written; see `plan_header`.
    """
    header = plan_header(size, backing, options)
    length = header.header_bytes + header.table_bytes
    await storage.truncate(length)
    # a block device keeps what was there before
    await storage.punch(0, length)
    await storage.write(0, [header.pack() + (encode_name(backing.name) if backing else b"")])
    await storage.flush()

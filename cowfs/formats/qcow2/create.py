"""Making a new qcow2 image."""

from array import array
from collections.abc import Mapping
from typing import NamedTuple

from cowfs.block.image import Backing
from cowfs.errors import UsageError
from cowfs.formats.datafile import new_data_file, new_data_path
from cowfs.formats.options import parse_choice, parse_power, parse_switch, refuse_unknown
from cowfs.formats.qcow2.layout import (
    AUTOCLEAR_RAW_DATA,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_TYPES,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    MAX_BACKING_NAME,
    MAX_L1_BYTES,
    MIN_EXTENDED_CLUSTER_BITS,
    V2_LENGTH,
    V3_LENGTH,
    Header,
)
from cowfs.formats.qcow2.opening import open_image
from cowfs.storage import host
from cowfs.storage.base import Storage

OPTIONS = {
    "size": "size of the disk in bytes, with an optional suffix",
    "compat": "compatibility level: 1.1 (version 3) or 0.10 (version 2)",
    "backing_file": "file name of the backing image",
    "backing_fmt": "format of the backing image",
    "cluster_size": "cluster size, a power of two from 512 to 2M (default 64K)",
    "preallocation": "off, metadata, falloc or full",
    "lazy_refcounts": "on or off: QEMU may postpone updates of reference counts",
    "refcount_bits": "width of a reference count in bits, a power of two from 1 to 64 (default 16)",
    "compression_type": "zlib or zstd",
    "extended_l2": "on or off: writes copy no more than 1/32 of a cluster",
    "data_file": "file for the guest's data, new, in the directory of the image or below it",
    "data_file_raw": "on or off: the data file can also be used as a raw image",
}

_COMPAT = ("1.1", "0.10", "v3", "v2")
_PREALLOCATION = ("off", "metadata", "falloc", "full")
#: bytes of the disk that are preallocated in one step
_STEP = 1 << 30


class _Plan(NamedTuple):
    """Where the clusters of an empty image lie: header, refcount table, refcount blocks, L1, in this order."""

    table: int
    blocks: int
    l1: int

    @property
    def total(self) -> int:
        return 1 + self.table + self.blocks + self.l1


async def create(storage: Storage, size: int, backing: Backing | None, options: Mapping[str, str]) -> None:
    """Fill an empty storage with an image of ``size`` bytes. Raises `UsageError` before anything is written."""
    header, preallocation = plan_header(size, backing, options)
    plan = _plan(header)
    bits = header.cluster_bits
    header.refcount_table_offset = 1 << bits
    header.refcount_table_clusters = plan.table
    header.l1_offset = 1 + plan.table + plan.blocks << bits
    content = _build(header, plan, backing)
    if header.data_file is None:
        await _fill(storage, None, content, size, preallocation)
        return
    path = await host.ask(new_data_path, storage.name, header.data_file, file=storage.name)
    async with new_data_file(path) as data:
        await data.truncate(size)
        await _fill(storage, data, content, size, preallocation)


async def _fill(storage: Storage, data: Storage | None, content: list[bytes], size: int, preallocation: str) -> None:
    # a device that is too small for it keeps what it has
    await storage.truncate(max(sum(map(len, content)), storage.length))
    await storage.write(0, content)
    await storage.flush()
    if preallocation != "off":
        await _preallocate(storage, data, size, preallocation)


def plan_header(size: int, backing: Backing | None, options: Mapping[str, str]) -> tuple[Header, str]:
    """Return the header that options stand for, without places of tables, and what to preallocate.

    Raises `UsageError` for options that make no sense.
    """
    refuse_unknown("qcow2", options, OPTIONS)
    version = 3 if parse_choice(options, "compat", _COMPAT) in ("1.1", "v3") else 2
    bits = parse_power(options, "cluster_size", 64 << 10, 512, 2 << 20)
    order = parse_power(options, "refcount_bits", 16, 1, 64)
    compression = COMPRESSION_TYPES.index(parse_choice(options, "compression_type", COMPRESSION_TYPES))
    lazy = parse_switch(options, "lazy_refcounts")
    preallocation = parse_choice(options, "preallocation", _PREALLOCATION)
    if version == 2 and (order != 4 or lazy or compression):
        raise UsageError("refcount_bits, lazy_refcounts and compression_type need compat=1.1")
    if preallocation != "off" and backing is not None:
        raise UsageError("preallocation and a backing file exclude each other")
    header = Header(version, bits, size, 0, 0, 0, 0, refcount_order=order, compression_type=compression)
    header.length = V3_LENGTH + 8 if version == 3 else V2_LENGTH
    header.compatible = COMPATIBLE_LAZY_REFCOUNTS if lazy else 0
    header.incompatible = INCOMPATIBLE_COMPRESSION if compression else 0
    if parse_switch(options, "extended_l2"):
        if version == 2 or bits < MIN_EXTENDED_CLUSTER_BITS:
            raise UsageError("extended_l2 needs compat=1.1 and clusters of 16k or more")
        header.incompatible |= INCOMPATIBLE_EXTENDED_L2
    header.l1_entries = -(-size // (header.table_entries << bits))
    if header.l1_entries * 8 > MAX_L1_BYTES:
        raise UsageError(f"a disk of {size} bytes is too large for clusters of {1 << bits} bytes")
    _record_data_file(header, backing, options)
    if header.autoclear & AUTOCLEAR_RAW_DATA and preallocation == "off":
        # what is not allocated would say that the bytes of the data file are not the guest's
        preallocation = "metadata"
    if backing is not None:
        if backing.format:
            header.extensions.append((EXTENSION_BACKING_FORMAT, backing.format.encode()))
        name = backing.name.encode("utf-8", "surrogateescape")
        header.backing_offset = len(header.pack())
        header.backing_length = len(name)
        if len(name) > MAX_BACKING_NAME or header.backing_offset + len(name) > header.cluster_size:
            raise UsageError(f"the name of the backing file is too long: {len(name)} bytes")
    return header, preallocation


def _record_data_file(header: Header, backing: Backing | None, options: Mapping[str, str]) -> None:
    raw = parse_switch(options, "data_file_raw")
    if "data_file" not in options:
        if raw:
            raise UsageError("data_file_raw needs data_file")
        return
    if header.version == 2:
        raise UsageError("data_file needs compat=1.1")
    if raw and backing is not None:
        raise UsageError("data_file_raw and a backing file exclude each other")
    name = options["data_file"].encode("utf-8", "surrogateescape")
    header.data_file = options["data_file"]
    header.incompatible |= INCOMPATIBLE_DATA_FILE
    header.autoclear = AUTOCLEAR_RAW_DATA if raw else 0
    header.extensions.append((EXTENSION_DATA_FILE, name))
    if not 0 < len(name) <= MAX_BACKING_NAME or len(header.pack()) > header.cluster_size:
        raise UsageError(f"the name of the data file cannot be recorded: it has {len(name)} bytes")


def _plan(header: Header) -> _Plan:
    per_block = 8 << header.cluster_bits >> header.refcount_order
    per_table = header.cluster_size // 8
    l1 = -(-header.l1_entries * 8 >> header.cluster_bits)
    blocks = table = 1
    while True:
        total = 1 + table + blocks + l1
        if total <= blocks * per_block and blocks <= table * per_table:
            return _Plan(table, blocks, l1)
        blocks = max(blocks, -(-total // per_block))
        table = max(table, -(-blocks // per_table))


def _build(header: Header, plan: _Plan, backing: Backing | None) -> list[bytes]:
    """Return the clusters of an empty image."""
    size = header.cluster_size
    head = header.pack()
    if backing is not None:
        head += backing.name.encode("utf-8", "surrogateescape")
    table = array("Q", [(1 + plan.table + number) * size for number in range(plan.blocks)])
    table.byteswap()
    counts = _pack_ones(plan.total, header.refcount_order)
    return [
        head.ljust(size, b"\0"),
        table.tobytes().ljust(plan.table * size, b"\0"),
        counts.ljust(plan.blocks * size, b"\0"),
        bytes(plan.l1 * size),
    ]


def _pack_ones(count: int, order: int) -> bytes:
    """Return ``count`` reference counts of 1, each 2^order bits wide."""
    if order >= 3:
        return (1).to_bytes(1 << order - 3, "big") * count
    per_byte = 8 >> order
    full = sum(1 << (place << order) for place in range(per_byte))
    rest = sum(1 << (place << order) for place in range(count % per_byte))
    return bytes([full]) * (count // per_byte) + bytes([rest])


async def _preallocate(storage: Storage, data: Storage | None, size: int, how: str) -> None:
    """Map the whole disk to clusters that follow each other; ``how`` says whether the host's space is taken too."""
    image = await open_image(storage)
    if data is not None:
        image.attach_data(data)
    for start in range(0, size, _STEP):
        length = min(_STEP, size - start)
        image.link(await image.reserve(start, -(-length // image.cluster_size) * image.cluster_size))
        await image.flush()
    await storage.truncate(max(storage.length, image.refcounts.end << image.cluster_bits))
    if how != "metadata":
        await storage.preallocate(storage.length, full=False)
        if data is not None:
            await data.preallocate(size, full=how == "full")
    await storage.flush()

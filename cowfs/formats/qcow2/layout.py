"""qcow2 on disk: header, header extensions, entries. All integers are big-endian.

Section numbers of the specification are those of QEMU's ``docs/interop/qcow2``: "Header", "Feature name
table", "Host cluster management", "Cluster mapping".
"""

import struct
from dataclasses import dataclass, field

from cowfs.block.alignment import align_up
from cowfs.block.image import Backing
from cowfs.errors import CorruptImage, InvalidImage, Unsupported

MAGIC = b"QFI\xfb"
#: bytes of the fixed part of the header
V2_LENGTH = 72
V3_LENGTH = 104
#: bytes that change at once: the header fields that matter lie in the first sector
SECTOR = 512

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
#: so that a subcluster has a sector at least
MIN_EXTENDED_CLUSTER_BITS = 14
#: limits that QEMU keeps; bytes, but for the last
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_BACKING_NAME = 1023
MAX_SNAPSHOTS = 65536
#: bytes of an entry of L1 and of the refcount table
ENTRY_SIZE = 8

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA = 1 << 1

#: what this driver can read images with
KNOWN_INCOMPATIBLE = (
    INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2
)

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
#: cowfs's own, unknown to others, who keep it: what the image remembers of its backing file
EXTENSION_STAMP = 0x434F5753
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_DATA_FILE = 0x44415441

#: bits 9 to 55 of L1 and L2 entries: host offset
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
#: bits that no version gives a meaning to
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
#: refcount table entries: host offset of a refcount block, and what has no meaning yet
REFCOUNT_BLOCK_MASK = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED = 0x1FF
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0

#: parts of a cluster that extended L2 entries have a state for
SUBCLUSTERS = 32

COMPRESSION_TYPES = ("zlib", "zstd")

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


@dataclass
class Header:
    """The fields of the header ("Header"), and what its extensions say. Offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    backing_offset: int = 0
    backing_length: int = 0
    crypt_method: int = 0
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = V2_LENGTH
    compression_type: int = 0
    backing: Backing | None = None
    #: name of the external data file, if there is one
    data_file: str | None = None
    extensions: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def entry_words(self) -> int:
        """64-bit words of an L2 entry: two with extended L2 entries, the second one a bitmap."""
        return 2 if self.incompatible & INCOMPATIBLE_EXTENDED_L2 else 1

    @property
    def table_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // 8 // self.entry_words

    def pack(self) -> bytes:
        """Return header, extensions and backing file name as they stand at the start of the file."""
        packed = _V2.pack(
            MAGIC,
            self.version,
            self.backing_offset,
            self.backing_length,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_entries,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            packed += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.length)
            packed += bytes([self.compression_type, *bytes(7)])[: self.length - V3_LENGTH]
        for kind, data in self.extensions:
            packed += struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
        packed += bytes(8)
        return packed


def parse_header(head: bytes, file_length: int, *, for_repair: bool = False) -> Header:
    """Read the header from the first cluster of a file (or as much as there is of it).

    Raises `InvalidImage` for what is no qcow2 header, `Unsupported` for features that are not understood, by
    name. Nothing that the header claims has been used to allocate memory until it has passed.
    ``for_repair`` lets a place pass where no refcount table can be; see `has_refcount_table`.
    """
    if len(head) < V2_LENGTH:
        raise InvalidImage(f"is too short for a qcow2 image: {len(head)} bytes")
    fields = _V2.unpack_from(head)
    magic, version = fields[0], fields[1]
    if magic != MAGIC:
        raise InvalidImage("is not a qcow2 image")
    if version not in (2, 3):
        raise Unsupported(f"is of qcow2 version {version}; cowfs knows 2 and 3")
    header = Header(
        version=version,
        backing_offset=fields[2],
        backing_length=fields[3],
        cluster_bits=fields[4],
        size=fields[5],
        crypt_method=fields[6],
        l1_entries=fields[7],
        l1_offset=fields[8],
        refcount_table_offset=fields[9],
        refcount_table_clusters=fields[10],
        snapshots=fields[11],
        snapshots_offset=fields[12],
    )
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise InvalidImage(f"has a cluster size of 2^{header.cluster_bits}, which is out of range")
    head = head[: header.cluster_size]
    if version == 3:
        _parse_version_3(header, head)
    _parse_extensions(header, head)
    _check_features(header, head)
    _check_tables(header, file_length)
    if not for_repair:
        _check_refcount_table(header, file_length)
    _parse_backing(header, head)
    _parse_data_file(header)
    return header


def _parse_version_3(header: Header, head: bytes) -> None:
    if len(head) < V3_LENGTH:
        raise InvalidImage("is cut off inside its header")
    fields = _V3.unpack_from(head, V2_LENGTH)
    header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.length = fields
    if not V3_LENGTH <= header.length <= header.cluster_size or header.length % 8:
        raise InvalidImage(f"has a header length of {header.length}, which makes no sense")
    if len(head) < header.length:
        raise InvalidImage("is cut off inside its header")
    if header.refcount_order > 6:
        raise InvalidImage(f"has a reference count width of 2^{header.refcount_order} bits, which is out of range")
    if header.length > V3_LENGTH:
        header.compression_type = head[V3_LENGTH]


def _parse_extensions(header: Header, head: bytes) -> None:
    """Section "Header": extensions follow the header, up to the backing file name or the cluster's end."""
    end = len(head)
    if header.length < header.backing_offset < end:
        end = header.backing_offset
    position = header.length
    while position + 8 <= end:
        kind, length = struct.unpack_from(">II", head, position)
        if kind == EXTENSION_END:
            return
        position += 8
        if length > end - position:
            raise InvalidImage(f"has a header extension {kind:#010x} that reaches beyond the header")
        header.extensions.append((kind, head[position : position + length]))
        position += -(-length // 8) * 8


def _check_features(header: Header, head: bytes) -> None:
    if header.crypt_method:
        kind = {1: "AES", 2: "LUKS"}.get(header.crypt_method, f"method {header.crypt_method}")
        raise Unsupported(f"is encrypted ({kind}), which cowfs does not support")
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        names = _feature_names(header)
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        wanted = [names.get(bit) or f"unknown incompatible feature {bit}" for bit in bits]
        raise Unsupported(f"needs {', '.join(wanted)}, which cowfs does not support")
    if header.incompatible & INCOMPATIBLE_EXTENDED_L2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise InvalidImage(f"has extended L2 entries with clusters of {header.cluster_size} bytes, which are too small")
    if header.compression_type >= len(COMPRESSION_TYPES):
        raise Unsupported(f"uses compression type {header.compression_type}, which is unknown")
    if bool(header.compression_type) != bool(header.incompatible & INCOMPATIBLE_COMPRESSION):
        raise InvalidImage("has a compression type that contradicts its feature bits")


def _feature_names(header: Header) -> dict[int, str]:
    """Names of incompatible features, by bit ("Feature name table"); printable ASCII only."""
    names: dict[int, str] = {}
    for kind, data in header.extensions:
        if kind == EXTENSION_FEATURE_NAMES:
            for start in range(0, len(data) - 47, 48):
                if data[start] == 0:
                    text = data[start + 2 : start + 48].split(b"\0")[0].decode("ascii", "replace")
                    names[data[start + 1]] = f"the feature '{text}'" if text.isprintable() else "a nameless feature"
    return names


def _check_tables(header: Header, file_length: int) -> None:
    size = header.cluster_size
    if header.size >= 1 << 63:
        raise InvalidImage(f"claims a disk of {header.size} bytes")
    if header.l1_entries * 8 > MAX_L1_BYTES:
        raise InvalidImage(f"has an L1 table of {header.l1_entries} entries, which is too large")
    covered = header.l1_entries * header.table_entries * size
    if covered < header.size:
        raise InvalidImage("has an L1 table that is too small for its disk")
    if header.snapshots > MAX_SNAPSHOTS:
        raise InvalidImage(f"claims {header.snapshots} internal snapshots, which is too many")
    _check_place(header, "L1 table", header.l1_offset, header.l1_entries * 8, file_length)
    if header.snapshots:
        _check_place(header, "snapshot table", header.snapshots_offset, 40 * header.snapshots, file_length)


def _check_refcount_table(header: Header, file_length: int) -> None:
    if not header.refcount_table_clusters:
        raise InvalidImage("has no refcount table")
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    if table_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise InvalidImage(f"has a refcount table of {table_bytes} bytes, which is too large")
    _check_place(header, "refcount table", header.refcount_table_offset, table_bytes, file_length)


def has_refcount_table(header: Header, file_length: int) -> bool:
    """Whether there can be a refcount table where the header says, in a file of so many bytes."""
    try:
        _check_refcount_table(header, file_length)
    except (InvalidImage, CorruptImage):
        return False
    return True


def _check_place(header: Header, what: str, offset: int, length: int, file_length: int) -> None:
    if length and (offset % header.cluster_size or not offset):
        raise CorruptImage(f"has its {what} at offset {offset:#x}, which is not a place for one")
    if offset + length > file_length:
        raise CorruptImage(f"has its {what} at offset {offset:#x}, beyond the end of the file")


def _parse_backing(header: Header, head: bytes) -> None:
    if not header.backing_offset:
        return
    start, length = header.backing_offset, header.backing_length
    if length > MAX_BACKING_NAME or start < header.length or start + length > header.cluster_size:
        raise InvalidImage("has a backing file name that does not lie inside its first cluster")
    if start + length > len(head):
        raise InvalidImage("is cut off inside its backing file name")
    if not length:
        return
    name = head[start : start + length].decode("utf-8", "surrogateescape")
    format = next((data for kind, data in header.extensions if kind == EXTENSION_BACKING_FORMAT), b"")
    if "\0" in name:
        raise InvalidImage("has a backing file name with a NUL byte in it")
    header.backing = Backing(name, format.decode("ascii", "replace") or None)


def _parse_data_file(header: Header) -> None:
    """Incompatible bit 2 and its extension ("External data file name"); what they exclude is refused."""
    if not header.incompatible & INCOMPATIBLE_DATA_FILE:
        return
    name = next((data for kind, data in header.extensions if kind == EXTENSION_DATA_FILE), b"")
    if not name or b"\0" in name:
        raise InvalidImage("has an external data file without saying what it is called")
    if header.snapshots:
        raise InvalidImage("has internal snapshots and an external data file, which exclude each other")
    if header.autoclear & AUTOCLEAR_RAW_DATA and header.backing is not None:
        raise InvalidImage("has a backing file and a raw external data file, which exclude each other")
    header.data_file = name.decode("utf-8", "surrogateescape")


def metadata_size(header: Header, size: int, data: int | None = None) -> int:
    """Bytes of header, tables and counts for a disk of ``size`` bytes, all of it allocated; by the formulas of QEMU.

    ``data`` are the bytes of it that lie in the image itself, if not all of them.
    """
    unit = header.cluster_size
    l2_tables = -(-size // (header.table_entries * unit))
    tables = unit + l2_tables * unit + align_up(l2_tables * ENTRY_SIZE, unit)
    clusters = (tables + (size if data is None else data)) // unit
    per_block, per_table = unit * 8 >> header.refcount_order, unit // ENTRY_SIZE
    table = blocks = 0
    while True:
        # counts are counted too
        before = table, blocks
        blocks = -(-(clusters + table + blocks) // per_block)
        table = -(-blocks // per_table)
        if (table, blocks) == before:
            return tables + (blocks + table) * unit


def full_size(header: Header) -> int:
    """Bytes that the file takes when all of the disk is allocated, and nothing else."""
    size = align_up(header.size, header.cluster_size)
    data = 0 if header.incompatible & INCOMPATIBLE_DATA_FILE else size
    return data + metadata_size(header, size, data)

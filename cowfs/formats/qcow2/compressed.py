"""Compressed clusters ("Compressed Clusters Descriptor"): where they lie and how they are unpacked."""

import zlib
from typing import NamedTuple

import zstandard

from cowfs.errors import CorruptImage
from cowfs.formats.qcow2.layout import COMPRESSED

#: the unit in which a descriptor counts
SECTOR = 512


class Packed(NamedTuple):
    """Where the packed bytes of a cluster lie; ``length`` is rounded up to the end of a sector."""

    offset: int
    length: int


def locate(entry: int, cluster_bits: int) -> Packed:
    """Place that an L2 entry (with or without its flags) describes."""
    bits = 62 - (cluster_bits - 8)
    descriptor = entry & (COMPRESSED - 1)
    offset = descriptor & (1 << bits) - 1
    sectors = (descriptor >> bits) + 1
    return Packed(offset, sectors * SECTOR - offset % SECTOR)


def unpack(packed: bytes, compression_type: int, cluster_size: int) -> bytes:
    """Return the ``cluster_size`` bytes that were packed; what follows them is padding. `CorruptImage` if damaged."""
    try:
        if compression_type == 0:
            # raw deflate, no header
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, cluster_size)
        else:
            with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=False) as reader:
                data = reader.read(cluster_size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise CorruptImage(f"a compressed cluster cannot be unpacked: {error}") from error
    if len(data) != cluster_size:
        raise CorruptImage(f"a compressed cluster holds {len(data)} bytes in place of {cluster_size}")
    return data

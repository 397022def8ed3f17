"""Compressed clusters ("Compressed Clusters Descriptor"): where they lie, how they are unpacked, packed and written."""

import errno
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import trio
import zstandard

from cowfs.errors import CorruptImage, StorageError
from cowfs.formats.qcow2.layout import COMPRESSED
from cowfs.formats.qcow2.refcounts import Refcounts
from cowfs.storage.base import Storage

#: the unit in which a descriptor counts
SECTOR = 512
#: log2 of the window of deflate: QEMU reads with no larger one
_WINDOW_BITS = 12


def _best_inflater() -> tuple[Callable[..., Any], type[Exception]]:
    """Return what makes an object that inflates, and what that raises.

    isal takes about half the time of zlib. It is an extra, since both say the same.
    """
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.decompressobj, zlib.error
    # its stub has an instance in place of the class
    return isal_zlib.decompressobj, cast("type[Exception]", isal_zlib.error)


_inflater, _InflateError = _best_inflater()


class Packed(NamedTuple):
    """Where the packed bytes of a cluster lie; ``length`` is rounded up to the end of a sector."""

    offset: int
    length: int


def _offset_bits(cluster_bits: int) -> int:
    """Width of the host offset in a descriptor, ``x`` of the specification."""
    return 62 - (cluster_bits - 8)


def locate(entry: int, cluster_bits: int) -> Packed:
    """Place that an L2 entry (with or without its flags) describes."""
    bits = _offset_bits(cluster_bits)
    descriptor = entry & (COMPRESSED - 1)
    offset = descriptor & (1 << bits) - 1
    sectors = (descriptor >> bits) + 1
    return Packed(offset, sectors * SECTOR - offset % SECTOR)


def describe(offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry for ``length`` packed bytes at a host offset."""
    further_sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | further_sectors << _offset_bits(cluster_bits) | offset


def unpack(packed: bytes, compression_type: int, cluster_size: int) -> bytes:
    """Return the ``cluster_size`` bytes that were packed; what follows them is padding. `CorruptImage` if damaged."""
    try:
        if compression_type == 0:
            # raw deflate, no header
            data: bytes = _inflater(-zlib.MAX_WBITS).decompress(packed, cluster_size)
        else:
            with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=False) as reader:
                data = reader.read(cluster_size)
    except (_InflateError, zstandard.ZstdError) as error:
        # in our words, which do not depend on whose library it was
        kind = "zstd" if compression_type else "deflate"
        raise CorruptImage(f"a compressed cluster cannot be unpacked: its bytes are no {kind} data") from error
    if len(data) != cluster_size:
        raise CorruptImage(f"a compressed cluster holds {len(data)} bytes in place of {cluster_size}")
    return data


def pack(data: bytes | memoryview, compression_type: int) -> bytes | None:
    """Return the packed bytes of one cluster; None if they are no fewer."""
    if compression_type == 0:
        packer = zlib.compressobj(wbits=-_WINDOW_BITS, memLevel=9)
        packed = packer.compress(data) + packer.flush()
    else:
        packed = zstandard.ZstdCompressor().compress(data)
    return packed if len(packed) < len(data) else None


class PackedWriter:
    """Writes packed clusters one behind the other, byte by byte, over the borders of host clusters.

    Each of them counts as a reference to every host cluster that it touches. Where a count cannot go higher,
    or the next host cluster is not free, packing goes on in a new one.
    """

    def __init__(self, storage: Storage, refcounts: Refcounts, cluster_bits: int) -> None:
        self._storage = storage
        self._refcounts = refcounts
        self._bits = cluster_bits
        # host offset behind the last packed bytes; it means something inside of a cluster only
        self._tail = 0
        self._lock = trio.Lock()

    async def write(self, packed: bytes) -> int:
        """Write packed bytes to a place of their own; returns the L2 entry for them, whose references are counted.

        If it fails, nothing stays counted, or a leak at most where that fails too.
        """
        # one at a time: the zeros behind one must not hit the next
        async with self._lock:
            offset = await self._place(len(packed))
            entry = describe(offset, len(packed), self._bits)
            try:
                if offset + len(packed) > (1 << min(_offset_bits(self._bits), 56)):
                    raise StorageError("has reached the largest size with compressed clusters", errno=errno.EFBIG)
                # whole sectors, as they are read
                padding = bytes(-(offset + len(packed)) % SECTOR)
                await self._storage.write(offset, [packed, padding])
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._take_back(offset, len(packed))
                raise
            return entry

    async def _place(self, length: int) -> int:
        """Find room for so many bytes, less than a cluster, and count the references to it."""
        await self._refcounts.fetch(self._tail >> self._bits)
        # no await from here to the count: a flush might free the cluster
        if length <= self._room() and self._refcounts.share(self._tail >> self._bits):
            place = self._tail
        else:
            first, _ = await self._refcounts.allocate(1)
            place = first << self._bits
            room = self._room()
            follows = room and self._tail + room == place
            if follows and length > room and self._refcounts.share(self._tail >> self._bits):
                place = self._tail
        self._tail = place + length
        return place

    def _room(self) -> int:
        """Bytes that are left in the host cluster of the tail."""
        return -self._tail % (1 << self._bits)

    async def _take_back(self, offset: int, length: int) -> None:
        self.forget(offset, length)
        for cluster in range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1):
            await self._refcounts.release(cluster)

    def forget(self, offset: int, length: int) -> None:
        """Let nothing more be put behind a place whose host clusters are about to lose references."""
        if offset >> self._bits <= self._tail >> self._bits <= offset + length - 1 >> self._bits:
            self._tail = 0

"""What an overlay remembers of its backing file, so that one which has changed is not taken for what it was.

An overlay holds parts of a disk; the rest is what the backing file held when the overlay was put on it. If somebody
writes to the backing file, the two no longer make a disk, and nothing in the formats tells. So the overlay keeps a
stamp: size and modification time of the backing file, and a digest over its first table and a fixed sample of its
bytes; instead of the time, of an object, the name that a store has for its version, the ETag. It is compared
whenever the chain is opened. Versions decide where both were said in the same place; else the samples do.

The name that the header has for the backing file is part of the stamp: one for another name is of no meaning, since
other programs change the name and keep what they do not know.
"""

import logging
import struct
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

import trio
import xxhash

from cowfs.block.alignment import align_down
from cowfs.block.layer import Layer
from cowfs.errors import BaseChanged

log = logging.getLogger(__name__)

#: kind; place of the version; size; modification time in nanoseconds, or XXH3-64 of the version; XXH3-64 of the name;
#: XXH3-128 of the sample, of the whole
_STAMP = struct.Struct("<B7sQqQ16s16s")
_CHECK = struct.Struct("<Q")
#: kinds: with a time, as all had once; with a version
_TIMED, _VERSIONED = 1, 2
#: bytes of a packed stamp
STAMP_BYTES = _STAMP.size + _CHECK.size
#: places that are sampled, beside start and end, and bytes that are read at each
SAMPLES = 30
SAMPLE_BYTES = 4096
#: bytes hashed at once
_CHUNK = 4 << 20
_UNKNOWN = bytes(16)


class Stamp(NamedTuple):
    """What is known of a backing file; ``whole`` is the digest of all its bytes, zeros where nobody has taken it.

    ``version`` and ``place`` are digests of a store's name for the version, zero where there is none, and of where it
    was said.
    """

    size: int
    modified_ns: int
    name: int
    sample: bytes
    whole: bytes = _UNKNOWN
    version: int = 0
    place: bytes = bytes(7)

    def pack(self) -> bytes:
        """Return the bytes that an overlay keeps."""
        kind, time = (_VERSIONED, self.version) if self.version else (_TIMED, self.modified_ns)
        packed = _STAMP.pack(kind, self.place, self.size, time, self.name, self.sample, self.whole)
        return packed + _CHECK.pack(xxhash.xxh3_64_intdigest(packed))

    @classmethod
    def unpack(cls, data: bytes) -> "Stamp | None":
        """Read what `pack` has made; None for anything else."""
        if len(data) != STAMP_BYTES:
            return None
        kind, place, size, time, name, sample, whole = _STAMP.unpack(data[: _STAMP.size])
        (check,) = _CHECK.unpack(data[_STAMP.size :])
        if check != xxhash.xxh3_64_intdigest(data[: _STAMP.size]) or kind not in (_TIMED, _VERSIONED):
            return None
        if kind == _TIMED:
            return cls(size, time, name, sample, whole)
        return cls(size, 0, name, sample, whole, time, place)

    def difference(self, now: "Stamp") -> str | None:
        """Say in what way the backing file is not what it was, as a half-sentence; None if it is."""
        if self.size != now.size:
            return f"it had {self.size} bytes, and now has {now.size}"
        if _UNKNOWN not in (self.whole, now.whole):
            return "its content is another" if self.whole != now.whole else None
        if self.version and now.version:
            return self._difference_of_versions(now)
        if self.sample != now.sample:
            return "its content is another"
        if _UNKNOWN in (self.whole, now.whole) and not _is_same_time(self.modified_ns, now.modified_ns):
            date = datetime.fromtimestamp(now.modified_ns // 10**9)
            return f"it was modified at {date}, or is a copy made then"
        return None

    def _difference_of_versions(self, now: "Stamp") -> str | None:
        if self.version == now.version:
            return None
        if self.sample != now.sample:
            return f"the store calls it another version, and {SAMPLES + 2} samples of its content are not all the same"
        if self.place == now.place:
            return f"the store calls it another version, although {SAMPLES + 2} samples of its content are the same"
        return None


def _is_same_time(first: int, second: int) -> bool:
    """Whether two times are the same, also where one went through something that knows whole seconds only.

    Zero is a time that is not known.
    """
    if not first or not second or first == second:
        return True
    return not (first % 10**9 and second % 10**9) and first // 10**9 == second // 10**9


def stamp_of(above: Layer) -> Stamp | None:
    """Return what a layer remembers of its backing file; None if that is nothing, or of another one."""
    data = above.image.stamp
    if data is None or above.backing is None:
        return None
    stamp = Stamp.unpack(data)
    return None if stamp is None or stamp.name != _name(above) else stamp


def _name(above: Layer) -> int:
    name = above.backing.name if above.backing else ""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"))


async def identify(above: Layer, below: Layer, known: Stamp | None = None) -> Stamp:
    """Look at a backing file as it is now: a few reads, or none where its version is that of what is ``known``."""
    said = Stamp(whole_size(below), max(storage.modified_ns for storage in below.storages), _name(above), b"")
    seen = _versioned(said, below)
    if known is not None and seen.version and (known.size, known.version) == (seen.size, seen.version):
        return seen._replace(sample=known.sample)
    if known is not None and not known.version and seen.version and _old_sample(below) == known.sample:
        return said._replace(sample=known.sample)
    digest = xxhash.xxh3_128(below.image.fingerprint())
    for storage in below.storages:
        last = align_down(max(storage.length - 1, 0), SAMPLE_BYTES)
        places = [align_down(last * number // (SAMPLES + 1), SAMPLE_BYTES) for number in range(SAMPLES + 2)]
        for sample in await storage.read_each([(place, SAMPLE_BYTES) for place in places]):
            digest.update(sample)
    # which may have turned out not to tell versions from each other
    return _versioned(said, below)._replace(sample=digest.digest())


def _versioned(stamp: Stamp, below: Layer) -> Stamp:
    """A stamp, with what stores say of the version, where they do."""
    versions = [storage.version for storage in below.storages]
    if not all(versions):
        return stamp
    # never zero, and with a sign
    version = xxhash.xxh3_64_intdigest("\0".join(versions).encode("utf-8", "surrogateescape")) >> 1 | 1
    places = "\0".join(storage.place for storage in below.storages).encode("utf-8", "surrogateescape")
    return stamp._replace(version=version, place=xxhash.xxh3_64_digest(places)[:7])


def _old_sample(below: Layer) -> bytes:
    """What stamps once had for a sample, of what has a version: a digest over that."""
    digest = xxhash.xxh3_128(below.image.fingerprint())
    for storage in below.storages:
        digest.update(storage.version.encode("utf-8", "surrogateescape"))
    return digest.digest()


async def require_unchanged(above: Layer, below: Layer) -> None:
    """Raise `BaseChanged`, with what has changed, unless a backing file is what the layer on it remembers."""
    known = stamp_of(above)
    if known is None:
        return
    difference = known.difference(await identify(above, below, known))
    if difference is not None:
        raise BaseChanged(
            f"its backing file {below.name} has changed since this image was put on it ({difference}); if its content"
            f" is what it should be, say so: cowfs verify --accept {above.name}, or mount with -o accept-base",
            file=above.name,
        )


async def remember(above: Layer, below: Layer, whole: bytes = _UNKNOWN) -> None:
    """Have a layer that is open for writing remember its backing file as it is now, durably.

    Images that have no room for it, or that any write costs something, go without.
    """
    if above.image.spoiled_by_writing:
        return
    known = stamp_of(above)
    stamp = (await identify(above, below, known))._replace(whole=whole)
    if known is not None and known.difference(stamp) is None and whole in (_UNKNOWN, known.whole):
        return
    await above.begin()
    if not await above.image.set_stamp(stamp.pack()):
        log.info("%s: has no room to remember its backing file", above.name)


async def forget(above: Layer) -> None:
    """Have a layer remember nothing of its backing file, durably, since that is about to change."""
    if above.image.stamp is not None:
        await above.begin()
        await above.image.set_stamp(None)


def whole_size(layer: Layer) -> int:
    """Bytes of a layer's files."""
    return sum(storage.length for storage in layer.storages)


async def whole_digest(layer: Layer, progress: Callable[[int], None]) -> bytes:
    """Return the XXH3-128 digest of all bytes of a layer's files; ``progress`` is told how many are done."""
    digest = xxhash.xxh3_128()
    done = 0
    for storage in layer.storages:
        for offset in range(0, storage.length, _CHUNK):
            data = await storage.read_bytes(offset, min(_CHUNK, storage.length - offset))
            await trio.to_thread.run_sync(digest.update, data)
            done += len(data)
            progress(done)
    return digest.digest()

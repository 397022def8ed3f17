"""Rewriting the header's variable part: extensions and backing file name ("Header", "Header extensions").

The fixed fields, the place and length of the name among them, lie in the first sector of the file, which changes
at once. The extensions follow each other from the end of the fixed fields on, often beyond that sector. So a new
state of both is first written, as far as it lies behind the first sector, to where the old state has nothing; one
write of the first sector then makes it valid. Between the two, the old state is whole.

Where old and new must overlap behind the first sector, the old extensions are first copied out of the way. What
leads to the copy is a filler: a feature name table without names, whose length spans everything up to the copy.
Programs ignore it, and the next write of the first sector takes it away.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from cowfs.block.alignment import align_up
from cowfs.block.image import Backing
from cowfs.errors import Unsupported, UsageError
from cowfs.formats.qcow2.layout import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_STAMP,
    MAX_BACKING_NAME,
    SECTOR,
    Header,
)
from cowfs.storage.base import Storage

#: bytes; QEMU takes no longer format name
MAX_FORMAT_NAME = 15
#: place of offset and length of the backing file name among the fixed fields
_NAME_FIELDS = struct.Struct(">QI")
_NAME_FIELDS_AT = 8
_EXTENSION = struct.Struct(">II")
#: bytes of one entry of a feature name table; one of zeros is in no real table, so it tells a filler
_FEATURE_ENTRY = 48

Extensions = Sequence[tuple[int, bytes]]
#: offset in the file and content
Piece = tuple[int, bytes]


class State(NamedTuple):
    """What stands in the header cluster behind the fixed fields. Offsets and lengths in bytes."""

    pieces: tuple[Piece, ...]
    name_offset: int
    name_length: int


class Plan(NamedTuple):
    """States to go through, one write of the first sector each; all but the last mean the same as the old one.

    ``stale`` are the places, (offset, length), that nothing refers to after the last one.
    """

    states: list[State]
    extensions: list[tuple[int, bytes]]
    stale: list[tuple[int, int]]


def plan(header: Header, backing: Backing | None, stamp: bytes | None = None) -> Plan:
    """Find out how to get from a header to the same header with another backing file, or none, and another stamp.

    Raises `UsageError` for what no header can record, `Unsupported` if this header cluster has no room.
    """
    name, format = _encode(backing)
    kept = [entry for entry in header.extensions if not _is_filler(*entry)]
    old = _current(header)
    changed = [entry for entry in kept if entry[0] != EXTENSION_STAMP]
    if stamp is not None:
        changed.append((EXTENSION_STAMP, stamp))
    choices = _arrangements(changed, format)
    states: list[State] | None = None
    for extensions in choices:
        if (new := _place(header, old, extensions, name)) is not None:
            states = [new]
            break
    else:
        extensions = choices[-1]
        states = _detour(header, old, kept, extensions, name)
        if states is None and backing is None:
            # without a name the format says nothing, so it may stay where it cannot be taken out at once
            extensions, states = kept, [old._replace(name_offset=0, name_length=0)]
    if states is None:
        raise Unsupported("has no room in its header for the name and format of a new backing file")
    return Plan(states, list(extensions), _stale([old, *states[:-1]], states[-1]))


def first_sector(current: bytes, length: int, state: State) -> bytes:
    """Return the first sector in a state; ``current`` gives the ``length`` bytes of the fixed fields."""
    sector = bytearray(current[:length].ljust(SECTOR, b"\0")[:SECTOR])
    for offset, data in state.pieces:
        part = data[: max(SECTOR - offset, 0)]
        sector[offset : offset + len(part)] = part
    _NAME_FIELDS.pack_into(sector, _NAME_FIELDS_AT, state.name_offset, state.name_length)
    return bytes(sector)


async def write_rest(storage: Storage, state: State) -> None:
    """Write, durably, what a state has behind the first sector: nothing refers to it yet, or it stands there."""
    for offset, data in state.pieces:
        start = max(offset, SECTOR)
        if rest := data[start - offset :]:
            await storage.write(start, [rest])
    await storage.flush()


def _encode(backing: Backing | None) -> tuple[bytes, bytes]:
    """Return name and format as they are recorded, both empty if there is none."""
    if backing is None:
        return b"", b""
    name = backing.name.encode("utf-8", "surrogateescape")
    if not name or b"\0" in name or len(name) > MAX_BACKING_NAME:
        raise UsageError(f"the name of the backing file must have from 1 to {MAX_BACKING_NAME} bytes, none of them 0")
    format = (backing.format or "").encode()
    if len(format) > MAX_FORMAT_NAME or not format.isascii():
        raise UsageError(f"'{backing.format}' cannot be recorded as the format of the backing file")
    return name, format


def _arrangements(kept: Extensions, format: bytes) -> list[list[tuple[int, bytes]]]:
    """Orders in which the extensions could stand with a new backing format: in its old place, or first as in QEMU."""
    others = [entry for entry in kept if entry[0] != EXTENSION_BACKING_FORMAT]
    if not format:
        return [others]
    new = (EXTENSION_BACKING_FORMAT, format)
    place = next((index for index, entry in enumerate(kept) if entry[0] == EXTENSION_BACKING_FORMAT), 0)
    return [[*others[:place], new, *others[place:]], [new, *others]]


def _pack(extensions: Extensions) -> bytes:
    packed = b"".join(
        _EXTENSION.pack(kind, len(data)) + data.ljust(align_up(len(data), 8), b"\0") for kind, data in extensions
    )
    return packed + bytes(_EXTENSION.size)


def _is_filler(kind: int, data: bytes) -> bool:
    return kind == EXTENSION_FEATURE_NAMES and data[:_FEATURE_ENTRY] == bytes(_FEATURE_ENTRY)


def _current(header: Header) -> State:
    """Return the state that was read from the file; a filler, left by a crash, counts by its head alone."""
    offset = header.length
    pieces: list[Piece] = []
    extensions = header.extensions
    if extensions and _is_filler(*extensions[0]):
        length = len(extensions[0][1])
        pieces.append((offset, _filler(length)))
        offset += _EXTENSION.size + align_up(length, 8)
        extensions = extensions[1:]
    pieces.append((offset, _pack(extensions)))
    if header.backing is None:
        return State(tuple(pieces), 0, 0)
    name = header.backing.name.encode("utf-8", "surrogateescape")
    pieces.append((header.backing_offset, name))
    return State(tuple(pieces), header.backing_offset, header.backing_length)


def _filler(length: int) -> bytes:
    return _EXTENSION.pack(EXTENSION_FEATURE_NAMES, length) + bytes(_FEATURE_ENTRY)


def _place(header: Header, old: State, extensions: Extensions, name: bytes) -> State | None:
    """Return the new state, laid out so that one write of the first sector is enough; None if it cannot be."""
    stream = (header.length, _pack(extensions))
    end = _end(stream)
    if end > header.cluster_size:
        return None
    if not name:
        new = State((stream,), 0, 0)
        return new if _agree(old, new) else None
    for place in sorted({end, *map(_end, old.pieces), old.name_offset}):
        if end <= place <= header.cluster_size - len(name):
            new = State((stream, (place, name)), place, len(name))
            if _agree(old, new):
                return new
    return None


def _detour(header: Header, old: State, kept: Extensions, extensions: Extensions, name: bytes) -> list[State] | None:
    """Go through a copy of the extensions far behind everything; None if the cluster has no room for that."""
    far = align_up(max(SECTOR, header.length + len(_pack(extensions)), *map(_end, old.pieces)), 8)
    copy = (far, _pack(kept))
    end = _end(copy)
    states = []
    moved: tuple[Piece, ...] = ()
    if old.name_length:
        # extensions end where the name begins, at the latest: the name goes first
        moved = ((end, old.pieces[-1][1]),)
        states.append(State((*old.pieces[:-1], *moved), end, old.name_length))
        end += old.name_length
    filler = (header.length, _filler(far - header.length - _EXTENSION.size))
    if _end(filler) > SECTOR or end > header.cluster_size:
        return None
    states.append(State((filler, copy, *moved), states[-1].name_offset if states else 0, old.name_length))
    new = _place(header, states[-1], extensions, name)
    return [*states, new] if new is not None else None


def _end(piece: Piece) -> int:
    return piece[0] + len(piece[1])


def _agree(old: State, new: State) -> bool:
    """Whether the new state can be written, behind the first sector, without touching the old one."""
    for offset, data in old.pieces:
        for place, wanted in new.pieces:
            start, end = max(offset, place, SECTOR), min(offset + len(data), place + len(wanted))
            if start < end and data[start - offset : end - offset] != wanted[start - place : end - place]:
                return False
    return True


def _stale(before: Sequence[State], last: State) -> list[tuple[int, int]]:
    """Places behind the first sector that earlier states use and the last one does not."""
    found = []
    for piece in {(offset, len(data)) for state in before for offset, data in state.pieces}:
        start, end = max(piece[0], SECTOR), sum(piece)
        for place, data in sorted(last.pieces):
            if start < min(end, place):
                found.append((start, min(end, place) - start))
            start = max(start, min(end, place + len(data)))
        if start < end:
            found.append((start, end - start))
    return sorted(found)

"""A part of a storage: a storage like any other, and nothing outside of it is seen or touched."""

import errno
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storages import MemoryStorage

from cowfs.errors import CowfsError, InvalidImage, ReadOnly, StorageError
from cowfs.storage import FileStorage, open_storage
from cowfs.storage.base import Move, Region
from cowfs.storage.window import WindowStorage

WHOLE = random.Random(1).randbytes(5000)

_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write_now", "read", "read_now", "punch", "discard", "copy", "truncate"]),
        st.integers(0, 4000),
        st.integers(0, 3000),
    ),
    max_size=12,
)


@given(st.integers(0, 5000), st.integers(0, 5000) | st.none(), _STEPS)
async def test_it_is_a_storage_and_the_rest_stays_as_it_is(
    offset: int, size: int | None, steps: list[tuple[str, int, int]]
) -> None:
    if size is not None and offset + size > len(WHOLE):
        size = len(WHOLE) - offset
    whole = MemoryStorage("whole", WHOLE)
    window = WindowStorage("part", whole, offset, size)
    model = bytearray(WHOLE[offset:] if size is None else WHOLE[offset : offset + size])
    for number, (step, start, length) in enumerate(steps):
        data = bytes([number + 1]) * length
        if step in ("write", "write_now", "copy", "truncate"):
            end = start + length if step != "truncate" else length
            if size is not None and end > size:
                with pytest.raises(StorageError) as caught:
                    await _change(window, step, start, data)
                assert caught.value.errno == errno.ENOSPC
                continue
            await _change(window, step, start, data)
            if step == "truncate":
                if size is None:
                    model[length:] = bytes(max(length - len(model), 0))
            elif length:
                model.extend(bytes(max(end - len(model), 0)))
                model[start:end] = data
        elif step in ("punch", "discard"):
            await (window.punch if step == "punch" else window.discard)(start, length)
            inside = max(min(length, len(model) - start), 0)
            model[start : start + inside] = bytes(inside)
        else:
            buffers = [memoryview(bytearray(b"\xaa" * length)), memoryview(bytearray(b"\xaa" * 7))]
            if step == "read" or not window.read_now(start, buffers):
                await window.read(start, buffers)
            assert b"".join(buffers) == bytes(model[start : start + length + 7]).ljust(length + 7, b"\0")
        assert window.length == len(model)
        if step != "read_now":
            assert await window.read_bytes(0, len(model)) == bytes(model)
    assert whole.content[:offset] == WHOLE[:offset]
    if size is not None:
        assert whole.content[offset + size :] == WHOLE[offset + size :]


async def _change(window: WindowStorage, step: str, start: int, data: bytes) -> None:
    if step == "write":
        await window.write(start, [data])
    elif step == "write_now":
        assert window.write_now(start, [data])
    elif step == "copy":
        await window.copy_in([Move(MemoryStorage("source", data), 0, start, len(data))])
    else:
        await window.truncate(len(data))


async def test_holes_are_those_of_the_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(256 << 10)
        file.write(b"x" * (64 << 10))
    name = 'json:{"driver":"raw","offset":131072,"size":524288,"file.filename":"' + str(path) + '"}'
    window = await open_storage(name, writable=True)
    assert await window.regions(0, 1 << 20) == [
        Region(0, 128 << 10, hole=True),
        Region(128 << 10, 64 << 10, hole=False),
        Region(192 << 10, 320 << 10, hole=True),
        Region(512 << 10, 512 << 10, hole=True),
    ]
    assert await window.read_each([(128 << 10, 3), ((512 << 10) - 1, 3)]) == [b"xxx", bytes(3)]
    await window.punch(128 << 10, 1 << 20)
    assert path.read_bytes() == bytes(1 << 20)
    await window.preallocate(4096, full=True)
    await window.reopen(writable=False)
    with pytest.raises(ReadOnly):
        window.write_now(0, [b"x"])
    assert window.read_only
    await window.close()


async def test_parts_that_are_not_there_are_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    for text, says in (("offset", "from 8192 to 8192"), ("size", "from 0 to 8192")):
        with pytest.raises(InvalidImage, match=says):
            await open_storage(f'json:{{"driver":"raw","{text}":8192,"file.filename":"{path}"}}', writable=False)
    # it would be locked
    storage = FileStorage.open(str(path), writable=True)
    await storage.close()
    empty = await open_storage(f'json:{{"driver":"raw","offset":4096,"file.filename":"{path}"}}', writable=False)
    assert (empty.length, await empty.read_bytes(0, 3)) == (0, bytes(3))
    await empty.close()


async def test_a_part_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))

    def name(offset: int, size: int) -> str:
        return f'json:{{"driver":"raw","offset":{offset},"size":{size},"file.filename":"{path}"}}'

    first = await open_storage(name(0, 4096), writable=True)
    with pytest.raises(CowfsError, match="is being written to"):
        await open_storage(name(4096, 4096), writable=False)
    others = [await open_storage(each, writable=False, locking=False) for each in (name(4096, 4096), name(512, 512))]
    whole = await open_storage(str(path), writable=False, locking=False)
    assert {storage.identity for storage in others} == {first.identity}
    assert [first.overlaps(storage) for storage in (*others, whole)] == [False, True, True]
    assert [whole.overlaps(storage) for storage in (first, *others)] == [True, True, True]
    for storage in (first, *others, whole):
        await storage.close()


async def test_what_is_said_of_the_kind_and_of_writing_holds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(512))
    with pytest.raises(InvalidImage, match="is a regular file, which the driver 'host_device' does not open"):
        await open_storage(f'json:{{"driver":"host_device","filename":"{path}"}}', writable=False)
    with pytest.raises(ReadOnly, match="as its name says"):
        await open_storage(f'json:{{"driver":"raw","read-only":true,"file.filename":"{path}"}}', writable=True)
    with pytest.raises(CowfsError, match="needs the driver 'qcow2'"):
        await open_storage(f'json:{{"driver":"qcow2","file.filename":"{path}"}}', writable=True)

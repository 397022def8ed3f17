"""Local files and block devices.

What the page cache holds is read on the spot with ``preadv2(RWF_NOWAIT)``; what it does not hold, and every
call that waits for a device, runs in a worker thread. Writes go into the page cache, which takes them at
the speed of memory, so they are made on the spot too.

A file system that is served by somebody else, over a network or by a program (FUSE), may not answer for as long as it
likes. Of a file there nothing is asked on the spot, and its calls have threads of their own.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import trio

from cowfs.errors import Busy, CowfsError, ReadOnly, StorageError
from cowfs.storage import locks
from cowfs.storage.base import Move, ReadBuffers, Region, Storage, WriteBuffers, in_two
from cowfs.storage.mounts import mount_of

T = TypeVar("T")

#: ``<linux/fs.h>``: size of a block device in bytes
BLKGETSIZE64 = 0x80081272
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
#: ``<limits.h>``: most buffers one vectored call takes
IOV_MAX = 1024
#: bytes written at once where a hole cannot be punched
ZERO_CHUNK = 1 << 20
_ZEROS = bytes(ZERO_CHUNK)
#: bytes read and written at a time where the kernel cannot copy; they should stay in the processor's cache
COPY_BUFFER = 256 << 10
#: bytes from which on two threads copy: less is done before the second has begun
COPY_APART = 1 << 20
#: pieces copied before everything else gets its turn
COPY_TURN = 8
#: for copies that are made without suspending
_SCRATCH = memoryview(bytearray(256 << 10))

Common = WeakValueDictionary[Hashable, Any]
#: what files that are open for reading have in common, by identity, length and time of the last change
_COMMON: WeakValueDictionary[tuple[object, ...], Common] = WeakValueDictionary()

#: threads that the calls on one file of such a file system may take
_SERVED_THREADS = 16

#: errnos by which a file system says that it has no RWF_NOWAIT reads; tmpfs is one: all it holds is memory
_NO_NOWAIT = (errno.EOPNOTSUPP, errno.ENOSYS)
#: errnos by which ``copy_file_range`` says that it does not do these two files
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM)


def _advance(buffers: list[memoryview], done: int) -> list[memoryview]:
    """Return what is left of ``buffers`` after their first ``done`` bytes."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []


class FileStorage(Storage):
    """One open file descriptor on a regular file or a block device."""

    def __init__(self, name: str, fd: int, *, read_only: bool, locking: bool) -> None:
        self.name = name
        self._locking = locking
        self.read_only = read_only
        self._fd = fd
        status = os.fstat(fd)
        self._is_device = stat.S_ISBLK(status.st_mode)
        self._identity = _identity(status)
        self.length = _device_size(fd) if self._is_device else status.st_size
        if read_only and locking and not self._is_device:
            # the locks keep it as it is
            key = (*self._identity, status.st_size, status.st_mtime_ns)
            self.common = _COMMON.setdefault(key, Common())
        mount = mount_of(fd, status.st_dev)
        #: whether the file system may not answer
        self._is_served = mount is not None and mount.is_served and not self._is_device
        self._is_memory = mount is not None and mount.is_memory
        self._limiter = trio.CapacityLimiter(_SERVED_THREADS) if self._is_served else None
        # of a served file, as of the last call that waited for its server
        self._status = status
        self._free = _free_space(fd, name) if self._is_served else 0
        self._reads_now = not self._is_served
        self._nowait = os.RWF_NOWAIT
        self._flush_error: StorageError | None = None
        # from which the kernel cannot copy into this one
        self._uncopyable: set[tuple[object, ...]] = set()
        # start and end of data that the last search for a hole has passed
        self._dense = (0, 0)

    @classmethod
    def open(cls, path: str, *, writable: bool, locking: bool = True) -> "FileStorage":
        """Open an existing file or block device. Blocks.

        Raises `StorageError` with the host's errno, EINVAL for what holds no bytes (a FIFO, a terminal), and, with
        ``locking``, `Busy` if another process uses it in a way that excludes this one.
        """
        name = os.fspath(path)
        fd = _open(name, os.O_RDWR if writable else os.O_RDONLY)
        try:
            if locking:
                _lock(fd, name, writable=writable)
            return cls(name, fd, read_only=not writable, locking=locking)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, path: str, *, exclusive: bool = False) -> "FileStorage":
        """Make an empty file, or empty an existing one; a block device is opened as it is. Blocks."""
        name = os.fspath(path)
        flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0)
        with _reported(name, "cannot create"):
            fd = os.open(name, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            _refuse_odd_kinds(name, fd)
            _lock(fd, name, writable=True)
            if stat.S_ISBLK(os.fstat(fd).st_mode):
                _require_unclaimed(name)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                with _reported(name, "cannot be emptied"):
                    os.ftruncate(fd, 0)
            return cls(name, fd, read_only=False, locking=True)
        except BaseException:
            os.close(fd)
            raise

    @property
    def identity(self) -> tuple[object, ...]:
        """Device and inode (of a block device: its number), so that two names of one file are one."""
        return self._identity

    @property
    def keeps_old_bytes(self) -> bool:
        """A block device cannot be emptied."""
        return self._is_device

    @property
    def is_device(self) -> bool:
        """Whether it is a block device, and no regular file."""
        return self._is_device

    @property
    def allocated(self) -> int:
        """Bytes of host space, from ``st_blocks``; the size, on a block device."""
        return self.length if self._is_device else self._fstat().st_blocks * 512

    @property
    def modified_ns(self) -> int:
        """A block device's time is that of its name."""
        return 0 if self._is_device else self._fstat().st_mtime_ns

    def _fstat(self) -> os.stat_result:
        """Of a served file, as it was when its server was waited for last, since this runs on the trio thread."""
        return self._status if self._is_served else os.fstat(self._fd)

    def fileno(self) -> int:
        """Return the descriptor, for the few calls that only local files have."""
        return self._fd

    # -- reading

    def read_now(self, offset: int, buffers: ReadBuffers) -> bool:
        """One ``preadv2`` that does not wait for a device; False for cold data, and to retry what came short."""
        if not self._reads_now:
            return False
        try:
            done = os.preadv(self._fd, buffers, offset, self._nowait)
        except BlockingIOError:
            return False
        except OSError as error:
            if self._nowait and error.errno in _NO_NOWAIT:
                self._reads_now = self._is_memory
                self._nowait = 0
                return self.read_now(offset, buffers)
            raise StorageError.from_os(error, file=self.name, doing="cannot read") from error
        wanted = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        return done == wanted or (offset + done >= self.length and _zero_rest(buffers, done))

    async def read(self, offset: int, buffers: ReadBuffers) -> None:
        """Fill the buffers in a worker thread."""
        await self._in_thread("cannot read", self._read_fully, offset, buffers)

    def _read_fully(self, offset: int, buffers: ReadBuffers) -> None:
        rest = [view for view in buffers if len(view)]
        while rest:
            done = os.preadv(self._fd, rest[:IOV_MAX], offset)
            if done == 0:
                _zero_rest(rest, 0)
                return
            offset += done
            rest = _advance(rest, done)

    # -- writing

    def write_now(self, offset: int, buffers: WriteBuffers) -> bool:
        """Write into the page cache, in as many calls as it takes; False where a server has it."""
        if self.read_only:
            raise ReadOnly("is open read-only", file=self.name)
        if self._is_served:
            return False
        try:
            if len(buffers) == 1:
                total = len(buffers[0])
                done = os.pwrite(self._fd, buffers[0], offset)
            else:
                total = sum(map(len, buffers))
                done = os.pwritev(self._fd, buffers, offset) if len(buffers) <= IOV_MAX else 0
            if done != total:
                self._write_rest(offset + done, _advance([memoryview(b) for b in buffers], done))
        except OSError as error:
            if not self._is_device:
                # a part of it may be there
                self.length = max(self.length, os.fstat(self._fd).st_size)
            raise StorageError.from_os(error, file=self.name, doing="cannot write") from error
        if offset + total > self.length:
            self.length = offset + total
        return True

    async def write(self, offset: int, buffers: WriteBuffers) -> None:
        """Write into the page cache, see `write_now`; or in a worker thread."""
        if not self.write_now(offset, buffers):
            await self._write_served(offset, buffers)

    async def _write_served(self, offset: int, buffers: WriteBuffers) -> None:
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        end = offset + sum(map(len, views))
        try:
            await self._in_thread("cannot write", self._write_rest, offset, views)
        except StorageError:
            # a part of it may be there
            self.length = max(self.length, await self._size())
            raise
        self.length = max(self.length, end)

    def _write_rest(self, offset: int, rest: list[memoryview]) -> None:
        while rest:
            done = os.pwritev(self._fd, rest[:IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            offset += done
            rest = _advance(rest, done)

    async def copy_in(self, moves: Sequence[Move]) -> None:
        """What the page cache holds is copied on the spot, a little at a time; the rest by a worker thread.

        A thread for all of it would be slower: on small pieces the two threads get in each other's way. Large ones
        are copied in the kernel, which may have a way to share them.
        """
        cold: list[Move] = []
        for number, move in enumerate(moves, start=1):
            if not self._copy_now(move):
                cold.append(move)
            if not number % COPY_TURN:
                await trio.lowlevel.checkpoint()
        if not all(move.source is None or isinstance(move.source, FileStorage) for move in cold):
            await super().copy_in(cold)
        elif cold:
            await self._copy_in_threads(cold)

    async def _copy_in_threads(self, moves: Sequence[Move]) -> None:
        """Copy in one worker thread, or in two where that pays; raises the first error after both have ended."""
        errors: list[CowfsError] = []

        async def copy(part: Sequence[Move]) -> None:
            try:
                await trio.to_thread.run_sync(self._copy, part, limiter=self._limiter)
            except OSError as error:
                errors.append(StorageError.from_os(error, file=self.name, doing="cannot write"))
            except CowfsError as error:
                errors.append(error)

        try:
            async with trio.open_nursery() as nursery:
                for part in in_two(moves) if sum(move.length for move in moves) >= COPY_APART else (moves,):
                    nursery.start_soon(copy, part)
        finally:
            if not self._is_device:
                # of a copy that failed, a part may be there
                self.length = max(self.length, await self._size())
        if errors:
            raise errors[0]

    async def _size(self) -> int:
        if not self._is_served:
            return os.fstat(self._fd).st_size
        with trio.CancelScope(shield=True):
            status = await self._in_thread("cannot read", os.fstat, self._fd)
        return status.st_size

    def _copy_now(self, move: Move) -> bool:
        if move.length > len(_SCRATCH):
            return False
        view = _SCRATCH[: move.length]
        if move.source is None:
            view = memoryview(_ZEROS)[: move.length]
        elif not move.source.read_now(move.source_offset, [view]):
            return False
        return self.write_now(move.offset, [view])

    def _copy(self, moves: Sequence[Move]) -> None:
        for source, source_offset, offset, length in moves:
            if not isinstance(source, FileStorage):
                self._write_zeros(offset, length)
                continue
            done = self._copy_in_kernel(source, source_offset, offset, length)
            if done == length:
                continue
            buffer = memoryview(bytearray(min(COPY_BUFFER, length - done)))
            for position in range(done, length, len(buffer)):
                part = buffer[: length - position]
                with _reported(source.name, "cannot read"):
                    source._read_fully(source_offset + position, [part])
                self._write_rest(offset + position, [part])

    def _copy_in_kernel(self, source: "FileStorage", source_offset: int, offset: int, length: int) -> int:
        """Copy as far as the kernel can; bytes done. At the end of the source it stops, and who reads on gets zeros.

        What kind of error it was that stopped it, reading and writing will tell.
        """
        done = 0
        while done < length and source.identity not in self._uncopyable:
            try:
                step = os.copy_file_range(source._fd, self._fd, length - done, source_offset + done, offset + done)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    self._uncopyable.add(source.identity)
                break
            if not step:
                break
            done += step
        return done

    async def flush(self) -> None:
        """``fdatasync`` in a worker thread. A failure is remembered: the kernel reports it only once."""
        if self._flush_error is not None:
            raise self._flush_error
        try:
            await self._in_thread("cannot flush", self._sync)
        except StorageError as error:
            self._flush_error = error
            raise

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._look_again()

    def _look_again(self) -> None:
        """Ask a server what the trio thread may want to know next."""
        if self._is_served:
            self._status = os.fstat(self._fd)
            self._free = _free_space(self._fd, self.name)

    async def truncate(self, length: int) -> None:
        """``ftruncate``; a block device keeps its size and refuses what does not fit into it."""
        if self.read_only:
            raise ReadOnly("is open read-only", file=self.name)
        if self._is_device:
            if length > self.length:
                raise StorageError("the device is too small", errno=errno.ENOSPC, file=self.name)
            return
        self._dense = (0, 0)
        await self._in_thread("cannot resize", self._truncate, length)
        self.length = length

    def _truncate(self, length: int) -> None:
        os.ftruncate(self._fd, length)
        self._look_again()

    async def punch(self, offset: int, length: int) -> None:
        """Punch a hole, or write zeros where the host has no holes. What lies past the end is left alone."""
        length = min(length, self.length - offset)
        if length <= 0:
            return
        if self.read_only:
            raise ReadOnly("is open read-only", file=self.name)
        self._dense = (0, 0)
        await self._in_thread("cannot punch a hole", self._punch, offset, length)

    def _punch(self, offset: int, length: int) -> None:
        try:
            _fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            self._write_zeros(offset, length)
        self._look_again()

    def _write_zeros(self, offset: int, length: int) -> None:
        while length > 0:
            size = min(length, ZERO_CHUNK)
            self._write_rest(offset, [memoryview(_ZEROS)[:size]])
            offset, length = offset + size, length - size

    async def preallocate(self, length: int, *, full: bool) -> None:
        """``posix_fallocate``, or zeros written out; on a device there is nothing to take."""
        if self._is_device:
            return
        call = self._write_zeros if full else partial(os.posix_fallocate, self._fd)
        await self._in_thread("cannot preallocate", call, 0, length)
        self.length = max(self.length, length)

    def free_space(self) -> int | None:
        """``fstatvfs``; of a served file, as of the last flush."""
        if self._is_device:
            return None
        return self._free if self._is_served else _free_space(self._fd, self.name)

    def take_space(self, offset: int, length: int) -> None:
        """``fallocate``, which does not take an empty range: such is the L1 table of a disk of no bytes."""
        if self._is_device or self._is_served or not length:
            return
        try:
            _fallocate(self._fd, 0, offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return
            raise StorageError.from_os(error, file=self.name, doing="cannot take space") from error
        self.length = max(self.length, offset + length)

    # -- the rest

    async def regions(self, offset: int, length: int) -> list[Region]:
        """``SEEK_DATA`` and ``SEEK_HOLE`` along the range, in a worker thread.

        The search for a hole does not stop at the range's end, and on tmpfs takes its time for every page. So what it
        passes is remembered; if somebody punches a hole there later, that is merely read as the zeros it is.
        """
        if self._is_device or (self._dense[0] <= offset and offset + length <= self._dense[1]):
            return [Region(offset, length, hole=False)]
        return await self._in_thread("cannot read", self._regions, offset, offset + length)

    def _regions(self, start: int, end: int) -> list[Region]:
        found: list[Region] = []
        while start < end:
            try:
                data = min(os.lseek(self._fd, start, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end
            if data > start:
                found.append(Region(start, data - start, hole=True))
            if data < end:
                hole = os.lseek(self._fd, data, os.SEEK_HOLE)
                self._dense = data, hole
                start = min(hole, end)
                found.append(Region(data, start - data, hole=False))
            else:
                start = end
        return found

    async def reopen(self, *, writable: bool) -> None:
        """Swap the descriptor under its number, so that a thread in the middle of a call keeps a valid file."""
        if writable == self.read_only:
            await self._in_thread("cannot open", self._reopen, writable)
            self.common = None
            self.read_only = not writable

    def _reopen(self, writable: bool) -> None:
        fd = _open(self.name, os.O_RDWR if writable else os.O_RDONLY)
        try:
            status = os.fstat(fd)
            if self._identity != _identity(status):
                raise StorageError("was replaced by another file", errno=errno.ESTALE, file=self.name)
            if self._locking:
                self._exchange_locks(fd, writable=writable)
            # with the old descriptor's last name go its locks
            os.dup2(fd, self._fd, inheritable=False)
            self._status = status
        finally:
            os.close(fd)

    def _exchange_locks(self, fd: int, *, writable: bool) -> None:
        """Lock another descriptor of the file for another use, with no moment between in which there is no lock."""
        use = locks.WRITING if writable else locks.READING
        locks.take(fd, use, self.name)
        locks.unlock(self._fd)
        try:
            locks.check(fd, use, self.name)
        except BaseException:
            locks.take(self._fd, locks.READING if self.read_only else locks.WRITING, self.name)
            raise

    async def close(self) -> None:
        """Close the descriptor; where a server has the file, which it is told of, in a worker thread."""
        if not self._is_served:
            self.close_now()
        elif self._fd >= 0:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.close_now, limiter=self._limiter)

    def close_now(self) -> None:
        """The same, on the spot. Blocks."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self.common = None

    async def _in_thread(self, doing: str, call: "Callable[..., T]", *args: object) -> T:
        try:
            return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)
        except OSError as error:
            raise StorageError.from_os(error, file=self.name, doing=doing) from error


@contextlib.contextmanager
def _reported(name: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.from_os(error, file=name, doing=doing) from error


def _open(name: str, flags: int) -> int:
    with _reported(name, "cannot open"):
        # O_NONBLOCK: opening a FIFO must not hang; it means nothing to regular files and block devices
        fd = os.open(name, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_odd_kinds(name, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, name: str, *, writable: bool) -> None:
    use = locks.WRITING if writable else locks.READING
    locks.take(fd, use, name)
    locks.check(fd, use, name)


def _require_unclaimed(name: str) -> None:
    """Raise `Busy` for a block device that the kernel uses: one that is mounted, swapped to, or part of another."""
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Busy("is in use: it is mounted, or part of another device", file=name) from error
        raise StorageError.from_os(error, file=name, doing="cannot open") from error


def _refuse_odd_kinds(name: str, fd: int) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise StorageError("is a directory, not an image", errno=errno.EISDIR, file=name)
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise StorageError("is neither a regular file nor a block device", errno=errno.EINVAL, file=name)


def _device_size(fd: int) -> int:
    answer = fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))
    return int(struct.unpack("Q", answer)[0])


def _zero_rest(buffers: ReadBuffers, done: int) -> bool:
    """Zero all but the first ``done`` bytes of ``buffers``."""
    for buffer in _advance([memoryview(b) for b in buffers], done):
        buffer[:] = bytes(len(buffer))
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_ino


def file_identity(name: str) -> tuple[int, int] | None:
    """Return the `Storage.identity` that a file would have; None if there is none. Blocks."""
    try:
        return _identity(os.stat(name))  # noqa: PTH116
    except OSError:
        return None


def _free_space(fd: int, name: str) -> int:
    with _reported(name, "cannot tell the free space"):
        state = os.fstatvfs(fd)
    return state.f_bavail * state.f_frsize


def sync_directory(name: str) -> None:
    """Make the name of a new file durable. Blocks; raises `StorageError`."""
    with _reported(name, "cannot make the directory entry durable"):
        fd = os.open(Path(name).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)``, of which Python's library has only the POSIX part."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

"""Recording an access trace of a disk into a file, and reading it for a stream that follows it."""

import errno
import logging
import os
import stat
from dataclasses import dataclass

import trio

from cowfs.block.disk import Disk
from cowfs.block.trace import MAX_BYTES, Recording, Trace
from cowfs.errors import Busy, CowfsError, StorageError, UsageError
from cowfs.formats.chain import Vet
from cowfs.jobs.journal import WRITTEN_SUFFIX, write_new
from cowfs.storage import host, sync_directory
from cowfs.storage.names import derived_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceFile:
    """A trace that was read, and its file."""

    path: str
    trace: Trace


async def load_trace(path: str, vet: Vet | None = None) -> TraceFile:
    """Read a trace. Raises `UsageError` for a relative name or what is no trace, or `StorageError`."""
    if not path.startswith("/"):
        raise UsageError("is no absolute path", file=path)
    if vet is not None:
        await vet(path)
    try:
        return TraceFile(path, Trace.parse(await host.ask(_read, path, file=path)))
    except CowfsError as error:
        error.file = path
        raise


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError("is no regular file")
            if status.st_size > MAX_BYTES:
                raise UsageError(f"has more than {MAX_BYTES} bytes")
            return file.read(MAX_BYTES)
    except OSError as error:
        raise StorageError.from_os(error, file=path, doing="cannot read") from error


class Tracer:
    """The trace of one disk: being recorded, or the last that was."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._path: str | None = None
        self._recording: Recording | None = None
        self._is_active = False
        self._lock = trio.Lock()

    @property
    def facts(self) -> dict[str, object]:
        """State, file, ranges, bytes, and whether there was more than a trace takes."""
        recording = self._recording
        return {
            "state": "recording" if self._is_active else "none" if recording is None else "stopped",
            "file": self._path,
            "ranges": len(recording.ranges) if recording is not None else 0,
            "bytes": recording.bytes if recording is not None else 0,
            "full": "yes" if recording is not None and recording.is_full else "no",
        }

    async def start(self, path: str) -> None:
        """Record from now on; the file, which must not exist, is made at once, and complete after `stop`.

        Raises `Busy` if one is being recorded, what `Disk.record` raises, or `StorageError`.
        """
        async with self._lock:
            if self._is_active:
                raise Busy(f"a trace is being recorded into {self._path}; stop it first")
            self._disk.require_recordable()
            await trio.to_thread.run_sync(_make, path, Trace(self._disk.size, []).render())
            self._path, self._recording = path, Recording(self._disk.recorded_unit)
            self._disk.record(self._recording.note)
            self._is_active = True

    async def stop(self) -> None:
        """Record no more, and write the file as a whole. Raises `UsageError` if nothing is recorded, `StorageError`.

        After an error the recording goes on.
        """
        async with self._lock:
            if not self._is_active or self._recording is None or self._path is None:
                raise UsageError("no trace is being recorded")
            data = self._recording.trace(self._disk.size).render()
            await trio.to_thread.run_sync(_replace, self._path, data)
            self._is_active = False
            self._disk.record(None)

    async def close(self) -> None:
        """Write what is being recorded, if anything is; an error is logged."""
        if self._is_active:
            try:
                await self.stop()
            except CowfsError as error:
                log.error("the trace is lost: %s", error)


def _make(path: str, data: bytes) -> None:
    try:
        write_new(path, data)
        sync_directory(path)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise UsageError("exists already", file=path) from None
        raise StorageError.from_os(error, file=path, doing="cannot create") from error


def _replace(path: str, data: bytes) -> None:
    new = derived_name(path, WRITTEN_SUFFIX)
    try:
        write_new(new, data)
        try:
            os.replace(new, path)  # noqa: PTH105
        except BaseException:
            os.unlink(new)  # noqa: PTH108
            raise
        sync_directory(path)
    except OSError as error:
        raise StorageError.from_os(error, file=path, doing="cannot write") from error

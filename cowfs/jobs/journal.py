"""Jobs that survive a restart: what a job is to do stands in a small file beside the active layer's.

The file is there from before the job's first change until the job has ended; whoever serves the disk next starts the
same job from it. It is text, a ``key: value`` a line, with a check over all of it in the last line, and is replaced as
a whole: a file that is there is complete, or it is refused.

Layers are named by their files, since their numbers change.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import trio
import xxhash

from cowfs.block.layer import Layer
from cowfs.errors import CowfsError, StorageError
from cowfs.formats.backingnames import BackingNames
from cowfs.jobs.job import Job, OnError, State
from cowfs.storage.file import FileStorage, sync_directory
from cowfs.storage.names import derived_name

log = logging.getLogger(__name__)

#: what the journal's name has behind that of the active layer's file
SUFFIX = ".cowfs-job"
#: what the name of a file has behind it that is being written, and then takes the place of another
WRITTEN_SUFFIX = ".new"
#: that of the journal, while it is being written
NEW_SUFFIX = SUFFIX + WRITTEN_SUFFIX
#: bytes; a larger file is none of ours
MAX_BYTES = 64 << 10
_VERSION = "1"
_VERBS = ("stream", "commit")
_NO_RESTART = "will not go on after a restart"
#: there can be no file of a name that is too long for the file system, or as a path
_NOT_THERE = (errno.ENOENT, errno.ENAMETOOLONG)
_PIVOTS = ("no", "yes", "wait")


class Merged(NamedTuple):
    """A layer that will be worth nothing once a commit has ended."""

    format: str
    name: str


@dataclass(frozen=True)
class Entry:
    """What a job is to do. ``speed`` in bytes a second; all names absolute.

    ``file`` is the active layer. A stream has only a ``base``, or none for all of the chain, and perhaps a
    ``trace`` that it follows. A commit goes from ``top`` into ``base``, and makes the ``merged`` layers worth
    nothing, from the top down. ``above`` is the layer above the top, unless that is the active one.
    """

    verb: str
    file: str
    speed: int = 0
    on_error: str = OnError.REPORT.value
    names: str = BackingNames.KEEP.value
    paused: bool = False
    base: str | None = None
    top: str | None = None
    pivot: str | None = None
    above: str | None = None
    merged: tuple[Merged, ...] = ()
    trace: str | None = None

    def render(self) -> bytes:
        """Return the file's content."""
        lines = [f"cowfs-job: {_VERSION}", f"verb: {self.verb}", f"file: {_quoted(self.file)}"]
        lines += [f"speed: {self.speed}", f"on-error: {self.on_error}", f"paused: {'yes' if self.paused else 'no'}"]
        for key, name in (("base", self.base), ("top", self.top), ("above", self.above), ("trace", self.trace)):
            if name is not None:
                lines.append(f"{key}: {_quoted(name)}")
        if self.names != BackingNames.KEEP.value:
            lines.append(f"backing-names: {self.names}")
        if self.pivot is not None:
            lines.append(f"pivot: {self.pivot}")
        lines += [f"merged: {_quoted(layer.format)} {_quoted(layer.name)}" for layer in self.merged]
        body = "".join(f"{line}\n" for line in lines).encode()
        return body + _check_line(body)

    @classmethod
    def parse(cls, data: bytes) -> "Entry":
        """Read a file's content. Raises `CowfsError` for anything but what `render` makes."""
        body, _, _ = data.rpartition(b"check: ")
        if not body or data != body + _check_line(body):
            raise CowfsError("is damaged")
        pairs = [line.partition(": ")[::2] for line in body.decode("ascii", "replace").splitlines()]
        if pairs[0] != ("cowfs-job", _VERSION):
            raise CowfsError("is of a version that this program does not know")
        facts = dict(pairs)
        merged = [value.partition(" ")[::2] for key, value in pairs if key == "merged"]
        try:
            entry = cls(
                verb=facts["verb"],
                file=_unquoted(facts["file"]),
                speed=int(facts["speed"]),
                on_error=facts["on-error"],
                names=facts.get("backing-names", BackingNames.KEEP.value),
                paused=facts["paused"] == "yes",
                pivot=facts.get("pivot"),
                merged=tuple(Merged(_unquoted(format), _unquoted(name)) for format, name in merged),
                **{key: _unquoted(facts[key]) for key in ("base", "top", "above", "trace") if key in facts},
            )
        except (KeyError, ValueError):
            raise CowfsError("makes no sense") from None
        if entry.render() != data or not entry._makes_sense():
            raise CowfsError("makes no sense")
        return entry

    def _makes_sense(self) -> bool:
        if self.verb not in _VERBS or not 0 <= self.speed < 1 << 63 or self.on_error not in [p.value for p in OnError]:
            return False
        if self.names not in [names.value for names in BackingNames]:
            return False
        if self.verb == "commit":
            has_all = None not in (self.top, self.base) and self.pivot in _PIVOTS
            return has_all and self.trace is None and (self.above is None) == (self.top == self.file)
        return (self.top, self.pivot, self.above, self.merged) == (None, None, None, ())

    def has_layers_of(self, other: "Entry") -> bool:
        """Whether two jobs do the same to the same layers, be it in another way."""
        return (self.verb, self.file, self.top, self.base) == (other.verb, other.file, other.top, other.base)

    # -- whether a chain is still the one that it was

    def fits(self, names: Sequence[str]) -> bool:
        """Whether a chain, given by its layers' names, is one that the job can be started on again."""
        if names[0] != self.file:
            return False
        if self.verb == "stream":
            return self.base is None or self.base in names[1:]
        return _has_run(names, [self.linked, *(layer.name for layer in self.between), self.base])

    def is_relinked(self, names: Sequence[str]) -> bool:
        """Whether the layers that a commit takes out of a chain are out of it, and perhaps not marked as merged."""
        between = {layer.name for layer in self.between}
        return (
            names[0] == self.file
            and bool(between)
            and between.isdisjoint(names)
            and _has_run(names, [self.linked, self.base])
        )

    @property
    def linked(self) -> str | None:
        """The layer that a commit puts on its base."""
        return self.top if self.above is None else self.above

    @property
    def between(self) -> list[Merged]:
        """The layers that a commit takes out of the chain to put another on its base."""
        return [layer for layer in self.merged if layer.name != self.file]


def _has_run(names: Sequence[str], run: Sequence[str | None]) -> bool:
    return any(list(names[start : start + len(run)]) == list(run) for start in range(len(names)))


def _quoted(name: str) -> str:
    return quote(os.fsencode(name))


def _unquoted(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text))


def _check_line(body: bytes) -> bytes:
    return f"check: {xxhash.xxh3_64_intdigest(body):016x}\n".encode()


def layer_name(layer: Layer) -> str:
    """Return by what name a journal knows a layer. Blocks."""
    return os.path.realpath(layer.name) if isinstance(layer.storage, FileStorage) else layer.name


# -- the file; all of this blocks


def journal_of(active: Layer) -> str | None:
    """Return where the journal of a disk with this active layer is; None where there can be none."""
    return derived_name(layer_name(active), SUFFIX) if isinstance(active.storage, FileStorage) else None


def read_journal(path: str) -> Entry | None:
    """Read a journal; None if there is none. Raises `CowfsError` for what is no journal of ours, and how one sees it.

    Whoever could write one could have the server change files that are not theirs, so it must belong to who reads it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise CowfsError("is no regular file", file=path) from error
        raise StorageError.from_os(error, file=path, doing="cannot open") from error
    try:
        _refuse_others(fd, path)
        with _reported(path, "cannot read"), open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES)
    finally:
        os.close(fd)
    try:
        return Entry.parse(data)
    except CowfsError as error:
        error.file = path
        raise


def find_journal(active: Layer) -> tuple[str, Entry | None]:
    """Return where the journal of a disk would be, and what it says, if there is one; see `read_journal`."""
    path = journal_of(active)
    return (path, read_journal(path)) if path is not None else ("", None)


def _refuse_others(fd: int, path: str) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CowfsError("is no regular file", file=path)
    if status.st_uid not in (0, os.geteuid()):
        raise CowfsError(f"belongs to another user ({status.st_uid})", file=path)
    if status.st_size > MAX_BYTES:
        raise CowfsError(f"has more than {MAX_BYTES} bytes", file=path)


def write_journal(path: str, entry: Entry) -> None:
    """Put a journal in place, or another in its place, durably, at once. Raises `CowfsError`; then nothing has changed.

    Only if the directory cannot be made durable, the new one is there in spite of the error.
    """
    data = entry.render()
    if len(data) > MAX_BYTES:
        raise CowfsError(f"would have more than {MAX_BYTES} bytes", file=path)
    new = derived_name(path, WRITTEN_SUFFIX)
    with _reported(path, "cannot write"):
        if not stat.S_ISREG(os.stat(entry.file).st_mode):  # noqa: PTH116
            raise CowfsError("is no regular file, which could have a journal beside it", file=entry.file)
        _unlink(new)
        try:
            write_new(new, data)
            os.replace(new, path)  # noqa: PTH105
        except BaseException:
            _unlink(new)
            raise
    sync_directory(path)


def write_new(path: str, data: bytes) -> None:
    """Make a file that nobody else can read, durably but for its name. Raises `OSError`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        if os.fstat(fd).st_uid != os.geteuid():
            raise CowfsError("would belong to another user", file=path)
        file.write(data)
        file.flush()
        os.fsync(fd)


def remove_journal(path: str) -> None:
    """Take a journal away, durably, if there is one. Raises `StorageError`."""
    with _reported(path, "cannot remove"):
        if not _unlink(path):
            return
    sync_directory(path)


def forget_jobs(file: str) -> None:
    """Take away what says that a job is to go on with an image of this name: it was another image. Blocks."""
    remove_journal(derived_name(os.path.realpath(file), SUFFIX))


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return False
    return True


@contextlib.contextmanager
def _reported(path: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.from_os(error, file=path, doing=doing) from error


# -- a job and its journal


class Recorded:
    """A job that goes on, and its journal, which is in step with it."""

    def __init__(
        self,
        job: Job,
        active: Layer,
        describe: Callable[[], Entry],
        lock: trio.Lock,
        found: Entry | None = None,
    ) -> None:
        """``describe`` blocks; ``found`` stands in the journal already; one ``lock`` is for all jobs of a disk."""
        self.job = job
        self._active = active
        self._describe = describe
        self._lock = lock
        self._entry = found
        self._path: str | None = None
        self._is_over = False
        #: set once the job has a state
        self.begun = trio.Event()
        #: set once the job has ended and its journal is gone, or kept for good
        self.over = trio.Event()
        job.resumes = found is not None

    async def run(self) -> None:
        """Run the job from the first line of its journal to the last; see `Job.run`.

        What ends from outside keeps its journal.
        """
        job = self.job
        try:
            if self._entry is None:
                await self._write_first()
            else:
                self._path = await trio.to_thread.run_sync(journal_of, self._active)
            try:
                await job.run(paused=self._entry is not None and self._entry.paused)
            finally:
                if job.is_told_to_cancel or job.state in (State.COMPLETED, State.FAILED):
                    with trio.CancelScope(shield=True):
                        await self._remove()
        finally:
            self.begun.set()
            self.over.set()

    async def _write_first(self) -> None:
        """Write the journal; where that fails, see to it that no older one is taken for this job's."""
        async with self._lock:
            try:
                self._path = await trio.to_thread.run_sync(journal_of, self._active)
                if self._path is None:
                    raise CowfsError("is no local file, which could have a journal beside it", file=self._active.name)
                self._entry = await trio.to_thread.run_sync(self._describe)
                await trio.to_thread.run_sync(write_journal, self._path, self._entry)
                self.job.resumes = True
            except CowfsError as error:
                log.warning("the %s job %s: %s", self.job.verb, _NO_RESTART, error)
                await self._clear()

    async def change(self, **fields: Any) -> None:
        """Have the journal say something else; what cannot be written is said in the log."""
        async with self._lock:
            if self._is_over or self._entry is None or self._path is None:
                return
            entry = replace(self._entry, **fields)
            if entry == self._entry and self.job.resumes:
                return
            try:
                await trio.to_thread.run_sync(write_journal, self._path, entry)
                self._entry, self.job.resumes = entry, True
            except CowfsError as error:
                how = "would go on after a restart as it was told before" if self.job.resumes else _NO_RESTART
                log.warning("the %s job %s: %s", self.job.verb, how, error)

    async def _remove(self) -> None:
        """Take the journal away; the job resumes until it is gone durably, as its name may come back before that."""
        async with self._lock:
            self._is_over = True
            if await self._clear():
                self.job.resumes = False
                self.job.on_change()

    async def _clear(self) -> bool:
        """Whether no journal is left; if one is, the log says so."""
        if self._path is not None:
            try:
                await trio.to_thread.run_sync(remove_journal, self._path)
            except CowfsError as error:
                log.error("%s; the next mount takes it for that of a job to go on with", error)
                return False
        return True

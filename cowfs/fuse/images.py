"""The images of one mount: opened, served, taken out again."""

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from cowfs.block.detectzeroes import ZeroDetector, detecting
from cowfs.block.disk import Disk
from cowfs.errors import Busy, CowfsError, NotFound, NotPermitted, StorageError, UsageError, blaming
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.chain import Opening, open_disk, remember_base
from cowfs.formats.jsonname import absolute_name, resolve_name
from cowfs.formats.overlay import NewLayer, path_beside, put_overlay, require_new
from cowfs.fuse.descriptors import require_room, too_many
from cowfs.fuse.inside import OwnMount
from cowfs.fuse.lostwrites import LostWrites
from cowfs.fuse.options import Settings
from cowfs.jobs.changes import Changes
from cowfs.jobs.control import JobControl, Neighbour
from cowfs.jobs.trace import Tracer
from cowfs.storage import Storage, host, is_json_name, is_remote, local_path, parse_address
from cowfs.storage.file import file_identity
from cowfs.storage.nursery import side_by_side

log = logging.getLogger(__name__)

#: names in the mount's root and in its control directory that no image can have
RESERVED = frozenset({".", "..", ".cowfs"})

_CLASH = "is part of the disk '{}', and one of them would write to it"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Source(NamedTuple):
    """An image to serve; the name defaults to the file's, the format to the mount's."""

    path: str
    name: str | None = None
    format: str | None = None
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read ``[NAME=]PATH``; a text that is the path of something that exists is just that."""
        name, sign, path = text.partition("=")
        if not sign or "/" in name or is_json_name(text) or is_remote(text) or os.path.lexists(text):
            return cls(text)
        return cls(path, name)

    def absolute(self) -> "Source":
        """Return the same for a server, whose working directory is /."""
        if is_json_name(self.path):
            return self._resolved(absolute_name)
        if is_remote(self.path):
            return self._replace(path=parse_address(self.path).absolute().uri)
        return self._replace(path=str(Path(self.path).absolute())) if self.path else self

    def resolved(self) -> "Source":
        """Return the same without a ``json:`` name of a format, and with an absolute path in one of anything else."""
        found = self._resolved(lambda name: name)
        path = local_path(found.path)
        if path is not None and is_json_name(self.path) and not path.startswith("/"):
            raise UsageError(f"'{path}' is no absolute path; the server's working directory is /", file=self.path)
        return found

    def _resolved(self, change: Callable[[str], str]) -> "Source":
        with blaming(self.path):
            name, format = resolve_name(self.path, self.format)
        return self._replace(path=change(name), format=format)


def default_name(path: str) -> str:
    """Name the disk of an image as the file is named, without its extension; or as the export, or the server."""
    if is_remote(path):
        address = parse_address(path)
        path = address.export or address.server
    return Path(local_path(path) or path).stem


def check_name(name: str, taken: frozenset[str] = RESERVED) -> None:
    """Raise `UsageError` for what cannot be the name of a flat file."""
    if not name or "/" in name or "\0" in name or "\n" in name or name in taken:
        raise UsageError(f"'{name}' cannot be the name of a disk; put another one before the file: NAME=FILE")
    if len(os.fsencode(name)) > 255:
        raise UsageError("the name of the disk is too long; put another one before the file: NAME=FILE")


class Served:
    """One image of the mount: its disk, its jobs, and what went wrong last."""

    def __init__(self, name: str, disk: Disk, opening: Opening, *, resume_jobs: bool = True) -> None:
        self.name = name
        self.disk = disk
        #: what guests read and write
        self.guest_disk: Disk | ZeroDetector = disk
        #: whether truncate(2) may make it smaller
        self.allow_shrink = False
        #: what names jobs and snapshots record that are not told otherwise
        self.backing_names = BackingNames.KEEP
        self._neighbours: Callable[[], list[Neighbour]] = list
        self._opening = opening
        self._resume_jobs = resume_jobs
        self.jobs: JobControl
        self.tracer = Tracer(disk)
        #: why the last command, read or write that failed did so
        self.error = ""
        #: anything that the control files show, but for counters and progress
        self.changes = Changes()
        #: sets the size of the flat file from outside, as truncate(2) does, so that the kernel knows of it
        self.truncate: Callable[[int], Awaitable[None]] = self.resize
        #: bytes; the only smaller size that a truncate(2) may give the disk: somebody has asked for it by name
        self.may_shrink_to: int | None = None
        #: what kept the last `resize` from being made
        self.resize_error: CowfsError | None = None
        #: discards from outside; then the kernel keeps nothing of what was there
        self.discard: Callable[[int, int], Awaitable[None]] = self.discard_here
        #: has the kernel write what it keeps of a node's range and has not written yet: inode, offset, length
        self.launder: Callable[[int, int, int], Awaitable[None]]
        #: flat views that are open, and those of them that can write
        self.open_files = self.writers = 0
        #: what was written to the kernel's cache and could not be stored
        self.lost = LostWrites()
        #: whether it was taken out of the mount
        self.is_removed = False
        #: commands and changes of size that are under way
        self.changing = 0
        self._copy_on_read = disk.copy_on_read
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._running = False

    @property
    def file(self) -> str:
        """Name of the active layer's file."""
        return self.disk.layers[0].name

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Stay in the mount while the context lasts, which changes it. Raises `NotFound` if it was taken out."""
        if self.is_removed:
            raise NotFound(f"the disk '{self.name}' is no longer part of the mount")
        self.changing += 1
        try:
            yield
        finally:
            self.changing -= 1

    def set_copy_on_read(self, wanted: bool) -> None:
        """Switch copy-on-read; a stream that runs keeps it on until it ends."""
        self._copy_on_read = wanted
        self._settle_copy_on_read()

    def _settle_copy_on_read(self) -> None:
        active = self.jobs.active
        self.disk.copy_on_read = self._copy_on_read or (active is not None and active.verb == "stream")
        self.changes.happened()

    async def resize(self, size: int) -> None:
        """Make the disk larger; or smaller, if that was asked for by name and no job goes on."""
        self.resize_error = None
        try:
            # nobody needs to have it open for that
            with self.kept():
                await self._resize(size)
        except CowfsError as error:
            self.resize_error = error
            raise
        self.changes.happened()

    async def _resize(self, size: int) -> None:
        if size > self.disk.size:
            await self.disk.grow(size)
        elif size < self.disk.size:
            if not (self.allow_shrink and size) and size != self.may_shrink_to:
                raise NotPermitted(
                    f"disks can only grow, not shrink from {self.disk.size} bytes, unless the mount has allow-shrink;"
                    " and never to nothing",
                    file=self.file,
                )
            await self._shrink(size)

    async def _shrink(self, size: int) -> None:
        """Make the disk smaller, with no job on it from now until that is done."""
        if not self._running:
            await self.disk.shrink(size)
            return
        before = self.disk.size
        if (job := self.jobs.active) is not None:
            raise Busy(f"a {job.verb} job is {job.state.value}; the disk cannot shrink meanwhile", file=self.file)
        with self.jobs.kept_out("the disk is being made smaller"):
            await self.disk.shrink(size)
        self.lost.rewritten(size, before - size)

    async def discard_here(self, offset: int, length: int) -> None:
        """Discard a range, whatever the kernel keeps of it."""
        await self.disk.discard(offset, length)
        self.lost.rewritten(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, with its space kept."""
        await self.disk.write_zeroes(offset, length)
        self.lost.rewritten(offset, length)

    async def flush(self) -> None:
        """Make durable what was written; an error as long as anything is missing that the kernel has taken."""
        await self.disk.flush()
        self.lost.require_none()

    async def put_overlay(
        self, file: str, format: str, *, reuse: bool = False, names: BackingNames | None = None
    ) -> None:
        """Make a new or prepared image the active layer; see `cowfs.formats.overlay.NewLayer`."""
        new = NewLayer(file, format, reuse, names or self.backing_names)
        with self.jobs.kept_out("a snapshot is being made"):
            active = self.disk.layers[0]
            await put_overlay(self.disk, new, self._opening, self._used_by_others)
            # what one was left alone, or was made in the place of an older one, is of no disk any more
            for layer in (active, self.disk.layers[0]):
                await self.jobs.drop_journal(layer)
        self.changes.happened()

    def _used_by_others(self) -> list[Storage]:
        layers = [layer for neighbour in self._neighbours() for layer in neighbour.disk.layers]
        return [storage for layer in layers for storage in layer.storages]

    async def record(self, file: str) -> None:
        """Record what reads fetch from below into a new file; see `Tracer.start`."""
        path = path_beside(self.disk.layers[0], file)
        await require_new(path, self._opening)
        await self.tracer.start(path)
        self.changes.happened()

    async def stop_recording(self) -> None:
        """End that; see `Tracer.stop`."""
        await self.tracer.stop()
        self.changes.happened()

    async def run(
        self, neighbours: Callable[[], list[Neighbour]], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve the disk and its jobs until `stop`."""
        # what goes on behind a disk ends after its jobs, which need it until they have tidied up
        background = trio.CancelScope(shield=True)
        try:
            async with side_by_side() as outer:
                try:
                    await outer.start(self._run_disk, background)
                    with self._scope:
                        async with side_by_side() as nursery:
                            self.jobs = JobControl(self.disk, nursery, neighbours)
                            self.jobs.vet = self._opening.vet
                            self.jobs.names = self.backing_names
                            self._neighbours = neighbours
                            self.jobs.on_change = self._settle_copy_on_read
                            self._running = True
                            await self._take_up_job()
                            task_status.started()
                            await trio.sleep_forever()
                finally:
                    background.cancel()
        finally:
            self._ended.set()

    async def _run_disk(self, scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await self.disk.run(task_status)

    async def _take_up_job(self) -> None:
        """Go on with the job of an earlier mount; what keeps it from that does not keep the disk from being served."""
        try:
            await self.jobs.take_up(wanted=self._resume_jobs, opening=self._opening)
        except CowfsError as error:
            self.error = f"no job of an earlier mount goes on: {error}"
            log.warning("%s: %s", self.name, self.error)
            self.changes.happened()

    @property
    def written(self) -> set[tuple[object, ...]]:
        """Files that are written, or worth nothing when the job that is active has ended."""
        layers = [layer for layer in self.disk.layers if not layer.storage.read_only]
        if self._running:
            layers += self.jobs.claimed
        return {storage.identity for layer in layers for storage in layer.storages}

    async def stop(self) -> None:
        """End the jobs, wait for what is in the background, flush and close."""
        await self.tracer.close()
        if self._running:
            self._scope.cancel()
            await self._ended.wait()
        await self.disk.close()
        self.lost.require_none()


class Mount:
    """All images of a mount, by name, in the order in which they came."""

    def __init__(self, mount_point: str, settings: Settings, reserved: frozenset[str] = frozenset()) -> None:
        self.mount_point = mount_point
        self.settings = settings
        self.images: dict[str, Served] = {}
        #: what must not be looked at
        self.own = OwnMount(mount_point)
        self._opening = Opening(
            *(settings.cache_size, self.own.vet, settings.locking, settings.accept_base, settings.network),
            vet_open=self.own.vet_open,
            from_here=False,
        )
        self.error = ""
        self.changes = Changes()
        #: called with an image that is taken out, before it is closed
        self.on_remove: Callable[[Served], None] = lambda served: None
        #: sets the size of a flat file; see `Served.truncate`
        self.truncate: Callable[[Served, int], Awaitable[None]] = Served.resize
        #: see `Served.discard` and `Served.launder`
        self.discard: Callable[[Served, int, int], Awaitable[None]] = Served.discard_here
        self.launder: Callable[[int, int, int], Awaitable[None]]
        self._taken = RESERVED | reserved
        self._nursery: trio.Nursery | None = None
        # whose names are given to images that are being added
        self._coming: set[str] = set()
        # whose files are open: those of `images`, and those that are being added and taken out
        self._open: list[Served] = []

    async def start(self, nursery: trio.Nursery) -> None:
        """Begin to serve the images that are open, and from now on those that are added."""
        self._nursery = nursery
        for served in self.images.values():
            await nursery.start(served.run, partial(self._neighbours, served))

    def _neighbours(self, served: Served) -> list[Neighbour]:
        return [Neighbour(other.name, other.disk) for other in self._open if other is not served]

    async def add(self, source: Source) -> None:
        """Open an image, and serve it if the mount is being served.

        Raises `UsageError` for names that are taken, `Busy` where two chains would write into each other's
        layers, `NotPermitted` for files inside the mount, or what opening the chain raises.
        """
        if not source.path:
            raise UsageError("there is no file name")
        source = source.resolved()
        path = source.path
        name = default_name(path) if source.name is None else source.name
        check_name(name, self._taken)
        if name in self.images:
            other = self.images[name].file
            raise UsageError(f"there is a disk '{name}' already ({other}); say which NAME this one has: NAME={path}")
        if name in self._coming:
            raise UsageError(f"a disk '{name}' is just being added; say which NAME this one has: NAME={path}")
        # opening may take long, and nobody else is to wait meanwhile
        self._coming.add(name)
        try:
            self.images[name] = await self._start(name, source)
        finally:
            self._coming.discard(name)
        self.changes.happened()

    async def _start(self, name: str, source: Source) -> Served:
        """Open an image, and serve it if the mount is being served."""
        writable = not (self.settings.read_only or source.read_only or self.settings.snapshot is not None)
        disk = await self._open_disk(source.path, source.format or self.settings.format, writable)
        served = self._make(name, disk)
        try:
            require_room(source.path)
            self._refuse_sharing(served)
            # from now on, whoever else comes sees that its files are taken
            self._open.append(served)
            await remember_base(disk)
            for layer in disk.layers:
                if layer.image.dirty and layer.storage.read_only:
                    log.warning(
                        "%s: was not closed cleanly, and is not repaired while it is open read-only", layer.name
                    )
            if self._nursery is not None:
                await self._nursery.start(served.run, partial(self._neighbours, served))
                # a job of another disk may have begun meanwhile
                self._refuse_sharing(served)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._stop(served)
            raise
        return served

    async def _stop(self, served: Served) -> None:
        try:
            await served.stop()
        finally:
            if served in self._open:
                self._open.remove(served)

    def _make(self, name: str, disk: Disk) -> Served:
        served = Served(name, disk, self._opening, resume_jobs=self.settings.resume_jobs)
        served.guest_disk = detecting(disk, self.settings.detect_zeroes)
        served.allow_shrink = self.settings.allow_shrink
        served.backing_names = self.settings.backing_names
        served.truncate = lambda size: self.truncate(served, size)
        served.discard = lambda offset, length: self.discard(served, offset, length)
        served.launder = self._launder
        return served

    async def _open_disk(self, path: str, format: str | None, writable: bool) -> Disk:
        try:
            return await open_disk(
                path,
                format,
                writable=writable,
                copy_on_read=self.settings.copy_on_read,
                flush_interval=self.settings.flush_interval,
                opening=self._opening,
                snapshot=self.settings.snapshot,
            )
        except Busy as error:
            await self._explain(error)
            raise
        except CowfsError as error:
            if error.errno == errno.EMFILE:
                raise too_many(path) from error
            if writable and error.errno in _NOT_WRITABLE and error.file == path and not isinstance(error, NotPermitted):
                error.message += "; it may be mounted read-only, with -o ro"
            raise

    def _refuse_sharing(self, served: Served) -> None:
        """A file that one chain writes to must not be part of another."""
        disk = served.disk
        for other in self._open:
            if other is served:
                continue
            written, used = other.written, _identities(other.disk)
            for layer in disk.layers:
                mine = layer is disk.layers[0] and not disk.read_only
                if any(storage.identity in (used if mine else written) for storage in layer.storages):
                    raise Busy(_CLASH.format(other.name), file=layer.name)

    async def _explain(self, error: Busy) -> None:
        """Name the disk of this mount that a file which cannot be locked is part of, if it is of any."""
        if error.file is None:
            return
        identity = await host.ask(file_identity, error.file, file=error.file)
        other = next((other for other in self._open if identity in _identities(other.disk)), None)
        if other is not None:
            error.message = _CLASH.format(other.name)

    async def _launder(self, inode: int, offset: int, length: int) -> None:
        # which is set after images have been added
        await self.launder(inode, offset, length)

    def stop_holding(self) -> None:
        """The mount is to end: nobody is to wait for ever for a server that is away."""
        for served in self.images.values():
            for layer in served.disk.layers:
                for storage in layer.storages:
                    storage.stop_holding()

    async def remove(self, name: str) -> None:
        """Take an image out and close it.

        Raises `NotFound`, or `Busy` if it is open, has a job, or is being changed.
        """
        served = self.images.get(name)
        if served is None:
            raise NotFound(f"there is no disk '{name}'")
        if served.jobs.active is not None:
            raise Busy(f"a {served.jobs.active.verb} job is active on '{name}'; cancel it first")
        if served.open_files:
            raise Busy(f"'{name}' is open")
        if served.changing:
            raise Busy(f"'{name}' is being changed")
        del self.images[name]
        served.is_removed = True
        self.on_remove(served)
        await self._stop(served)
        self.changes.happened()

    async def close(self) -> bool:
        """Stop and close all images; False if one of them could not be flushed. The log says which."""
        sound = True
        for served in list(self.images.values()):
            try:
                await self._stop(served)
            except CowfsError as error:
                log.error("closing '%s': %s", served.name, error)
                sound = False
        self.images.clear()
        return sound

    async def free_space(self) -> tuple[os.statvfs_result, int] | None:
        """Return the state of the first image's file system, and the largest cluster of all images in bytes."""
        if not self.images:
            return None
        first = next(iter(self.images.values()))
        largest = max(served.disk.cluster_size for served in self.images.values())
        if first.disk.layers[0].storage.is_remote:
            return _full(first.disk.size), largest
        try:
            state = await host.ask(os.statvfs, local_path(first.file) or first.file, file=first.file)
        except OSError as error:
            raise StorageError.from_os(error, file=first.file, doing="cannot tell the free space") from error
        return state, largest


def _full(size: int) -> os.statvfs_result:
    """Return the state of a file system of so many bytes, of which none are free: nobody knows about a server's."""
    unit = 4096
    return os.statvfs_result((unit, unit, size // unit, 0, 0, 0, 0, 0, 0, 255))


def _identities(disk: Disk) -> set[tuple[object, ...]]:
    return {storage.identity for layer in disk.layers for storage in layer.storages}

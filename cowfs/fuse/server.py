"""The server of one mount, from opening the images to the last flush."""

import contextlib
import importlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from cowfs.errors import CowfsError, StorageError
from cowfs.fuse import kernel
from cowfs.fuse.control import MOUNT_FILES
from cowfs.fuse.descriptors import raise_limit
from cowfs.fuse.images import Mount, Served, Source
from cowfs.fuse.loop import Loop
from cowfs.fuse.operations import Operations
from cowfs.fuse.options import Settings
from cowfs.fuse.shim.requests import Requests
from cowfs.fuse.tree import FlatFile, Node
from cowfs.storage import host
from cowfs.storage.mounts import mount_at

log = logging.getLogger(__name__)

#: seconds that a look at the host's files may take before the command that needs it fails; see `host.patience`
PATIENCE = 15.0
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Request:
    """What to mount where; all paths absolute."""

    sources: Sequence[Source]
    mount_point: str
    settings: Settings


def serve(request: Request, ready: Callable[[], None]) -> int:
    """Open the images, mount, and serve until unmounted or told to end by a signal; the exit code.

    ``ready`` is called once the mount answers. What goes wrong before is raised; afterwards it is logged.
    """
    # the name in ps, and in the words of who finds an image locked; a module that python runs has python's
    Path("/proc/self/comm").write_text("cowfs")
    raise_limit()
    return trio.run(_serve, request, ready)


async def _serve(request: Request, ready: Callable[[], None]) -> int:
    host.patience.set(PATIENCE)
    mount = Mount(request.mount_point, request.settings, frozenset(MOUNT_FILES))
    try:
        for source in request.sources:
            await mount.add(source)
        operations = Operations(mount)
        requests = Requests(operations)
        _mount(operations, requests, request)
        entry = mount_at(request.mount_point)
        mount.own.device = None if entry is None else entry.number
    except BaseException:
        with trio.CancelScope(shield=True):
            await mount.close()
        raise
    return await _Server(mount, operations, requests, ready).run()


def _mount(operations: Operations, requests: Requests, request: Request) -> None:
    requests.offer()
    with _stderr_kept() as said:
        try:
            pyfuse3.init(operations, request.mount_point, _fuse_options(request))
        except RuntimeError as error:
            reason = said().strip().replace("\n", "; ") or str(error)
            raise CowfsError(f"cannot mount: {reason}", file=request.mount_point) from error
    lacking = requests.take()
    if lacking is not None:
        log.warning("%s: no discards and holes, except through .cowfs: %s", request.mount_point, lacking)


def _fuse_options(request: Request) -> set[str]:
    settings = request.settings
    source = request.sources[0].path if len(request.sources) == 1 else "cowfs"
    if not source.isascii() or not source.isprintable() or set(source) & set(",\\ "):
        source = "cowfs"
    options = {f"fsname={source}", "subtype=cowfs", "default_permissions", *settings.flags}
    if settings.read_only:
        options.add("ro")
    if settings.allow_other:
        options.add("allow_other")
    return options


@contextlib.contextmanager
def _stderr_kept() -> Iterator[Callable[[], str]]:
    """Keep what libfuse prints on standard error, to make it part of our own one line."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class _Server:
    """The mount between its first and its last request."""

    def __init__(self, mount: Mount, operations: Operations, requests: Requests, ready: Callable[[], None]) -> None:
        self._mount = mount
        self._requests = requests
        self._tree = operations.tree
        self._ready = ready
        self._loop = Loop()
        self._announced = False
        self._overrun: set[FlatFile] = set()
        self._overruns = trio.Event()
        self._correctors = operations.correctors
        operations.on_overrun = self._note_overrun
        mount.on_remove = self._forget
        mount.truncate = self._truncate
        mount.discard = self._discard
        mount.launder = requests.launder
        operations.is_writeback = requests.is_writeback

    async def run(self) -> int:
        """Serve; the exit code."""
        crashed = False
        with trio.open_signal_receiver(*_ENDING) as signals:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._await_signal, signals)
                    await self._mount.start(nursery)
                    self._requests.serve(nursery)
                    nursery.start_soon(self._announce)
                    nursery.start_soon(self._correct_sizes)
                    await self._loop.serve()
                    nursery.cancel_scope.cancel()
            except Exception:
                log.exception("internal error; the mount ends")
                crashed = True
            sound = await self._mount.close()
            # after a crash the mount stays behind, visibly broken, rather than an empty directory
            pyfuse3.close(unmount=not (crashed and self._announced))
        return 0 if sound and not crashed else 1

    async def _announce(self) -> None:
        """See that the mount answers, and say so."""
        where = self._mount.mount_point
        await trio.to_thread.run_sync(os.statvfs, where, limiter=host.THREADS)
        await trio.to_thread.run_sync(kernel.tune, where, limiter=host.THREADS)
        self._announced = True
        log.info("%s: serving %s", where, ", ".join(self._mount.images) or "no images")
        try:
            self._ready()
        except BrokenPipeError:
            log.error("%s: ending, since the command that mounted was interrupted", where)
            self._loop.terminate()
        if not self._mount.settings.read_only:
            # the first write will need it, and should not wait for it
            await trio.to_thread.run_sync(importlib.import_module, "numpy", abandon_on_cancel=True)

    async def _await_signal(self, signals: AsyncIterator[int]) -> None:
        """The first signal ends the mount in order, a second one at once."""
        async with trio.open_nursery() as nursery:
            async for number in signals:
                log.info("%s: ending, after signal %d", self._mount.mount_point, number)
                self._mount.stop_holding()
                if nursery.child_tasks:
                    self._loop.terminate()
                else:
                    nursery.start_soon(self._end)

    async def _end(self) -> None:
        for name in list(self._mount.images):
            await self._ask_kernel(kernel.flush_pages, name)
        self._loop.terminate()

    async def _ask_kernel(self, call: Callable[..., None], name: str, *args: object) -> None:
        try:
            asking = partial(call, self._mount.mount_point, name, *args)
            await trio.to_thread.run_sync(asking, abandon_on_cancel=True, limiter=host.THREADS)
        except OSError as error:
            log.error("'%s': %s", name, error)

    # -- what the kernel has to be told

    def _note_overrun(self, node: Node) -> None:
        assert isinstance(node, FlatFile)
        self._overrun.add(node)
        self._overruns.set()

    async def _correct_sizes(self) -> None:
        while True:
            await self._overruns.wait()
            self._overruns = trio.Event()
            while self._overrun:
                served = self._overrun.pop().served
                await self._ask_kernel(self._correct_size, served.name, served.disk.size)

    def _correct_size(self, mount_point: str, name: str, size: int) -> None:
        """Have the kernel ask, in a thread; it may be another size by now, which the answer tells."""
        mine = threading.get_native_id()
        self._correctors.add(mine)
        try:
            kernel.correct_size(mount_point, name, size)
        finally:
            self._correctors.discard(mine)

    async def _truncate(self, served: Served, size: int) -> None:
        """Set the size of a flat file through the kernel, which asks us to do it, and then knows it."""
        try:
            asking = partial(kernel.correct_size, self._mount.mount_point, served.name, size)
            await trio.to_thread.run_sync(asking, limiter=host.THREADS)
        except OSError as error:
            if served.resize_error is not None:
                raise served.resize_error from error
            raise StorageError.from_os(error, file=served.file, doing="cannot resize") from error

    async def _discard(self, served: Served, offset: int, length: int) -> None:
        """Discard between what the kernel still has to write and what it reads next."""
        inode = self._tree.flat(served).inode
        await self._ask_kernel(kernel.flush_pages, served.name)
        await served.discard_here(offset, length)
        # a node that the kernel does not know has nothing in its cache
        with contextlib.suppress(FileNotFoundError):
            await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, abandon_on_cancel=True, limiter=host.THREADS)
        await self._ask_kernel(kernel.touch, served.name)

    def _forget(self, served: Served) -> None:
        """Make an image's names vanish from the kernel's memory too."""
        self._tree.forget(served)
        for directory in (self._tree.root, self._tree.control):
            pyfuse3.invalidate_entry_async(directory.inode, os.fsencode(served.name), ignore_enoent=True)

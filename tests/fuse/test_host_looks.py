"""Nothing follows a name of the host's files on the trio thread of a mount, whatever it is told to do."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from commandline import ok, qemu_img
from test_control import NOBODY, Kernel, serving

from cowfs.errors import StorageError
from cowfs.fuse.images import Source
from cowfs.fuse.inside import OwnMount
from cowfs.storage import FileStorage, create_storage, host, open_storage

pytestmark = pytest.mark.needs("qemu-img")

#: functions of ``os`` that follow a name or ask a file system about a descriptor, those with and without audit events
#: where code is loaded from when it is first needed
_CHECKOUT = str(Path(__file__).parents[2])
_CALLS = [
    *("stat", "lstat", "statvfs", "readlink", "access", "open", "unlink", "rename", "replace", "link", "symlink"),
    *("mkdir", "rmdir", "listdir", "scandir", "truncate", "utime", "chmod", "chown", "pathconf"),
]
_EVENTS = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.link", "os.truncate", "os.utime")


class Looks:
    """Names that have been followed on the thread that made this, while it is active."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.is_active = True
        self._thread = threading.get_ident()

    def note(self, what: str, path: object) -> None:
        if not self.is_active or threading.get_ident() != self._thread:
            return
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.fsdecode(path)
            # what the program itself is made of, and this process's own files in /proc
            if not name.startswith((sys.prefix, sys.base_prefix, "/proc/self/", _CHECKOUT, "/usr/lib")) and name != "/":
                self.found.append(f"{what} {name}")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Looks]:
    looks = Looks()
    for name in _CALLS:
        real = getattr(os, name)

        def call(*args: Any, _real: Any = real, _name: str = name, **options: Any) -> Any:
            looks.note(_name, args[0] if args else None)
            return _real(*args, **options)

        monkeypatch.setattr(os, name, call)
    sys.addaudithook(lambda event, args: looks.note(event, args[0]) if event in _EVENTS and looks.is_active else None)
    try:
        yield looks
    finally:
        # a hook cannot be taken away
        looks.is_active = False


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with chains of several formats, one of them with a data file."""
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(1 << 20))
    for name in ("vm", "other"):
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / f"{name}.qcow2"))
    ok(qemu_img("create", "-q", "-f", "qed", tmp_path / "third.qed", "1M"))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "fourth.qcow2", "1M"))
    (tmp_path / "link.qcow2").symlink_to("vm.qcow2")
    return tmp_path


async def ended(kernel: Kernel, verb: str) -> None:
    """Wait for the end of a job."""
    await kernel.mount.images["vm"].jobs.jobs[verb].wait()


async def test_no_command_follows_names_on_the_trio_thread(images: Path, looks: Looks) -> None:
    async with serving(Source(f"{images}/vm.qcow2", "vm")) as kernel:
        control, disk = ".cowfs/control", ".cowfs/vm"
        for path, text, number in [
            (control, f"add a={images}/other.qcow2", 0),
            (control, f"add {images}/third.qed format=qed", 0),
            (control, f"add {images}/fourth.qcow2", 0),
            (control, f"add d={images}/link.qcow2", 16),
            (control, f"add e={images}/missing", 2),
            (control, f"add f={images}", 21),
            (control, "remove fourth", 0),
            (f"{disk}/trace", "record first.trace", 0),
            (f"{disk}/trace", "stop", 0),
            (f"{disk}/snapshot", "create second.qcow2", 0),
            (f"{disk}/snapshot", "create second.qcow2", 22),
            (f"{disk}/snapshot", "create /nonexistent/x", 2),
            (f"{disk}/stream", "start base=1", 0),
            (f"{disk}/stream", f"start trace={images}/first.trace", 0),
            (f"{disk}/snapshot", "create third.qcow2", 0),
            (f"{disk}/commit", "start top=1 base=0", 0),
        ]:
            assert await kernel.write(path, text) == number, text
            if "start" in text and not number:
                await ended(kernel, path.rpartition("/")[2])
        for name in ("status", "status.json", "chain", "map", "stats", "trace"):
            await kernel.read(f"{disk}/{name}")
        handle = await kernel.open("vm", os.O_RDWR)
        await kernel.operations.write(handle, 0, b"x" * 100)
        await kernel.operations.fsync(handle, False)
        await kernel.operations.release(handle)
        await kernel.operations.getattr(await kernel.inode("vm"), NOBODY)
        await kernel.operations.statfs(NOBODY)
    assert looks.found == []


def test_the_rule_would_find_one(images: Path, looks: Looks) -> None:
    os.path.realpath(images / "link.qcow2")
    FileStorage.open(f"{images}/base.raw", writable=False).close_now()
    (images / "base.raw").exists()
    assert {what.split()[0] for what in looks.found} >= {"lstat", "readlink", "open", "stat"}


class _Gate:
    """A look that takes as long as a test wants."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, result: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(60)
        return result


async def test_a_look_is_given_up_on_and_its_result_undone() -> None:
    gate, undone = _Gate(), threading.Event()
    results: list[str] = []

    def undo(result: str) -> None:
        results.append(result)
        undone.set()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                await host.ask(gate, "result", file="file", undo=undo)

            nursery.start_soon(look)
            assert await trio.to_thread.run_sync(gate.begun.wait, 60)
            scope.cancel()
    assert not results
    gate.go_on.set()
    assert await trio.to_thread.run_sync(undone.wait, 60)
    assert results == ["result"]


async def test_a_look_takes_no_longer_than_there_is_patience() -> None:
    gate = _Gate()
    token = host.patience.set(0.05)
    try:
        with pytest.raises(StorageError, match=r"^file: the file system that it lies in has not answered") as caught:
            await host.ask(gate, None, file="file")
        assert os.strerror(caught.value.errno) == "Connection timed out"
    finally:
        gate.go_on.set()
        host.patience.reset(token)


async def test_looks_that_hang_keep_no_thread_from_reading(tmp_path: Path) -> None:
    gate = _Gate()
    (tmp_path / "file").write_bytes(b"content")
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(lambda: host.ask(gate, None, file="file"))
        await trio.to_thread.run_sync(gate.begun.wait, 60)
        storage = await open_storage(f"{tmp_path}/file", writable=False)
        buffer = bytearray(7)
        await storage.read(0, [memoryview(buffer)])
        assert buffer == b"content"
        await storage.close()
        gate.go_on.set()


@pytest.mark.parametrize("exists", [False, True])
async def test_a_file_whose_making_was_given_up_on_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    gate, closed = _Gate(), threading.Event()
    real_create, real_close = FileStorage.create, FileStorage.close_now
    monkeypatch.setattr(FileStorage, "create", lambda *args, **options: gate(real_create(*args, **options)))

    def close(storage: FileStorage) -> None:
        real_close(storage)
        closed.set()

    monkeypatch.setattr(FileStorage, "close_now", close)
    if exists:
        (tmp_path / "new").touch()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: create_storage(f"{tmp_path}/new", exclusive=not exists))
            await trio.to_thread.run_sync(gate.begun.wait, 60)
            scope.cancel()
    gate.go_on.set()
    assert await trio.to_thread.run_sync(closed.wait, 60)
    assert (tmp_path / "new").exists() == exists


# -- what leads into the mount


def test_paths_are_followed_without_asking_what_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    (own / "deep").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    for name, target in {
        "link": "own",
        "chain": "./link",
        "absolute": str(own),
        "there/back": "../own/deep",
        "round": "there/../absolute/x",
        "loop": "loop",
        "out": "there",
        "near": "ownership",
    }.items():
        (tmp_path / name).symlink_to(target)
    asked: list[str] = []
    real = os.readlink

    def readlink(path: str) -> str:
        asked.append(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    inside = ["own", "own/x", "link/a/b", "chain", "absolute/../own/q", "there/back/x", "round", "own/../own"]
    outside = ["out/x", "near", "loop", "loop/own", "missing/x", "there/../there", "", "ownership"]
    assert [name for name in inside + outside if host.leads_into(f"{tmp_path}/{name}", {str(own)})] == inside
    assert not [path for path in asked if path.startswith(str(own) + "/") or path == str(own)]


async def test_an_open_file_of_the_own_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage = await open_storage(f"{tmp_path}/file", writable=False)
    own = OwnMount("/nowhere")
    own.vet_open(storage)
    own.device = (tmp_path / "file").stat().st_dev
    with pytest.raises(Exception, match="file: lies inside the mount /nowhere, which cannot serve it to itself"):
        own.vet_open(storage)
    await storage.close()

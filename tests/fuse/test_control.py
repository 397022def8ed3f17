"""Control files and flat files, asked as the kernel asks, without a mount."""

import errno
import json
import os
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
from commandline import ok, qemu_img, qemu_io

from cowfs.fuse.control import MOUNT_FILES
from cowfs.fuse.images import Mount, Source
from cowfs.fuse.operations import Operations
from cowfs.fuse.options import Settings

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

NOBODY = cast("pyfuse3.RequestContext", None)
SIZE = 8 << 20
#: of a job file, to begin with
KEYS = ["state", "offset", "length", "percent", "rate", "speed", "eta"]


class Waiter:
    """Stands for pyfuse3's poll handle."""

    def __init__(self) -> None:
        self.calls = 0

    def notify(self) -> None:
        self.calls += 1


class Kernel:
    """Asks the handlers by path names."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.operations = Operations(mount)

    async def inode(self, path: str) -> int:
        inode = pyfuse3.ROOT_INODE
        for name in path.split("/"):
            inode = (await self.operations.lookup(inode, name.encode(), NOBODY)).st_ino
        return inode

    async def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        return (await self.operations.open(await self.inode(path), flags, NOBODY)).fh

    async def read(self, path: str) -> str:
        return (await self.content(path, 1 << 17)).decode()

    async def content(self, path: str, size: int) -> bytes:
        handle = await self.open(path)
        data = bytes(await self.operations.read(handle, 0, size))
        await self.operations.release(handle)
        return data

    async def write(self, path: str, text: str) -> int:
        """Write a command; the errno, 0 if it worked."""
        handle = await self.open(path, os.O_WRONLY)
        try:
            await self.operations.write(handle, 0, text.encode())
        except pyfuse3.FUSEError as error:
            return error.errno
        finally:
            await self.operations.release(handle)
        return 0

    async def job(self, verb: str) -> dict[str, str]:
        lines = (await self.read(f".cowfs/vm/{verb}")).splitlines()
        return dict(line.split(": ", 1) for line in lines)


@asynccontextmanager
async def serving(*sources: Source, settings: Settings | None = None) -> AsyncIterator[Kernel]:
    mount = Mount("/nowhere", settings or Settings(), frozenset(MOUNT_FILES))
    try:
        for source in sources:
            await mount.add(source)
        async with trio.open_nursery() as nursery:
            await mount.start(nursery)
            yield Kernel(mount)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            assert await mount.close()


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An overlay over an overlay over a raw file, of 8 MiB each, with something in all of them."""
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    base.write_bytes(os.urandom(SIZE))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top))
    qemu_io(middle, "qcow2", "write -P 2 1M 1M")
    qemu_io(top, "qcow2", "write -P 3 1536k 1M", "write -z 4M 64k")
    return top


async def test_what_there_is(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        assert await kernel.read(".cowfs/version") == "0.1.0\n"
        assert await kernel.read(".cowfs/control") == f"vm {chain}\n"
        assert await kernel.read(".cowfs/error") == await kernel.read(".cowfs/vm/error") == ""
        assert await kernel.read(".cowfs/vm/status") == (
            f"file: {chain}\nformat: qcow2\nsize: {SIZE}\ndepth: 3\nread-only: off\ncopy-on-read: on\n"
            "stream: none\ncommit: none\n"
        )
        folder = chain.parent
        assert await kernel.read(".cowfs/vm/chain") == (
            f"2 qcow2 {SIZE} {chain}\n1 qcow2 {SIZE} {folder}/middle.qcow2\n0 raw {SIZE} {folder}/base.raw\n"
        )
        assert await kernel.read(".cowfs/vm/map") == ok(qemu_img("map", "-U", "--output=json", chain))
        assert "reads: 0\n" in await kernel.read(".cowfs/vm/stats")
        facts = json.loads(await kernel.read(".cowfs/vm/status.json"))
        assert (facts["name"], facts["depth"], facts["jobs"]["stream"]["state"]) == ("vm", 3, "none")
        assert [layer["index"] for layer in facts["chain"]] == [2, 1, 0]
        whole = json.loads(await kernel.read(".cowfs/status.json"))
        assert (whole["pid"], whole["images"]) == (os.getpid(), [facts])


async def test_layers_show_the_disk_as_of_each(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        for number, name in enumerate(["base.raw", "middle.qcow2", "top.qcow2"]):
            handle = await kernel.open(f".cowfs/vm/layers/{number}")
            content = bytes(await kernel.operations.read(handle, 0, SIZE + 1))
            await kernel.operations.release(handle)
            out = chain.parent / "out"
            ok(qemu_img("convert", "-U", "-O", "raw", chain.parent / name, out))
            assert content == out.read_bytes()
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await kernel.open(".cowfs/vm/layers/3")
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await kernel.open(".cowfs/vm/layers/0", os.O_RDWR)
        assert caught.value.errno == errno.EPERM


async def test_layers_that_are_merged_away_say_so(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        read = kernel.operations.read
        disk = await kernel.content(".cowfs/vm/layers/2", SIZE)
        middle = await kernel.content(".cowfs/vm/layers/1", SIZE)
        handles = [await kernel.open(f".cowfs/vm/layers/{number}") for number in range(3)]
        # the job stands still after its first step
        assert await kernel.write(".cowfs/vm/commit", "start top=1 base=0 speed=1") == 0
        while (await kernel.job("commit"))["offset"] == "0":
            await trio.lowlevel.checkpoint()
        for handle, content in ((handles[1], middle), (handles[2], disk)):
            assert bytes(await read(handle, 0, SIZE)) == content
        # the base is on its way from one to the other
        assert bytes(await read(handles[0], SIZE - 4096, 4096)) == middle[-4096:]
        assert await kernel.write(".cowfs/vm/commit", "speed=0") == 0
        await kernel.mount.images["vm"].jobs.jobs["commit"].wait()
        assert (await kernel.job("commit"))["state"] == "completed"
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await read(handles[1], 0, 4096)
        assert caught.value.errno == errno.ESTALE
        assert "is no longer a layer of the chain" in await kernel.read(".cowfs/vm/error")
        # the numbers are those of the chain as it is now
        assert await kernel.content(".cowfs/vm/layers/1", SIZE) == disk
        assert await kernel.content(".cowfs/vm/layers/0", SIZE) == middle
        assert bytes(await read(handles[2], 0, SIZE)) == disk
        for handle in handles:
            await kernel.operations.release(handle)


@pytest.mark.parametrize(
    ("file", "text", "number", "sentence"),
    [
        ("stream", "", errno.EINVAL, "'' is no command; stream takes start, pause, resume, cancel, complete, speed=N"),
        ("stream", "go", errno.EINVAL, "'go' is no command; stream takes"),
        ("stream", "start=1", errno.EINVAL, "'start=1' is no command"),
        ("stream", "pause now", errno.EINVAL, "'pause now' is no command"),
        ("stream", "speed", errno.EINVAL, "'speed' is no command"),
        ("stream", "pause", errno.EINVAL, "no stream job is active, so there is nothing to pause"),
        ("stream", "cancel\n", errno.EINVAL, "no stream job is active, so there is nothing to cancel"),
        ("stream", "speed=1M", errno.EINVAL, "no stream job is active, so there is nothing to speed"),
        ("stream", "start speed=x", errno.EINVAL, "'x' is not a size"),
        ("stream", "start speed", errno.EINVAL, "stream has no key 'speed'"),
        (
            "stream",
            "start sped=1",
            errno.EINVAL,
            "stream has no key 'sped'; it takes backing-names, base, on-error, speed, trace",
        ),
        ("stream", "start base=x", errno.EINVAL, "base=x: 'x' is not the number of a layer"),
        ("stream", "start base=-1", errno.EINVAL, "base=-1: '-1' is not the number of a layer"),
        ("stream", "start base=3", errno.ENOENT, "base=3: there is no such layer; the chain has 0, the deepest, to 2"),
        ("stream", "start base=2", errno.EINVAL, "/"),
        ("stream", "start on-error=cry", errno.EINVAL, "on-error=cry is not one of report, stop, ignore"),
        ("stream", "start pivot=no", errno.EINVAL, "stream has no key 'pivot'"),
        ("commit", "start pivot=maybe", errno.EINVAL, "pivot=maybe is not one of no, yes, wait"),
        ("commit", "start top=1 base=1", errno.EINVAL, "/"),
        ("commit", "start top=0", errno.EINVAL, "/"),
        ("commit", "start top=9", errno.ENOENT, "top=9: there is no such layer"),
        ("commit", "start top=1 pivot=yes", errno.EINVAL, "/"),
        ("commit", "start\nstart", errno.EINVAL, "one command a write, on one line"),
        ("copy-on-read", "maybe", errno.EINVAL, "'maybe' is neither on nor off"),
    ],
)
async def test_refused_commands_say_why(chain: Path, file: str, text: str, number: int, sentence: str) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        assert await kernel.write(f".cowfs/vm/{file}", text) == number
        said = await kernel.read(".cowfs/vm/error")
        assert said.startswith(sentence)
        assert said.count("\n") == 1
        assert await kernel.write(".cowfs/vm/copy-on-read", "off\n") == 0
        assert await kernel.read(".cowfs/vm/error") == ""


async def test_a_stream_and_its_file(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        assert await kernel.write(".cowfs/vm/copy-on-read", "off") == 0
        assert await kernel.write(".cowfs/vm/stream", "start speed=1k on-error=report\n") == 0
        job = await kernel.job("stream")
        assert list(job) == [
            "state",
            "offset",
            "length",
            "percent",
            "rate",
            "speed",
            "eta",
            "pause",
            "resumes",
            "error",
        ]
        assert (job["state"], job["length"], job["speed"], job["error"]) == ("running", str(SIZE), "1024", "")
        assert job["resumes"] == "yes"
        assert await kernel.read(".cowfs/vm/copy-on-read") == "on\n"
        assert await kernel.write(".cowfs/vm/commit", "start") == errno.EBUSY
        assert await kernel.read(".cowfs/vm/error") == "a stream job is running; wait for it, or cancel it\n"
        assert await kernel.write(".cowfs/vm/stream", "start") == errno.EBUSY
        assert await kernel.write(".cowfs/control", "remove vm") == errno.EBUSY
        assert await kernel.write(".cowfs/vm/stream", "pause") == 0
        assert (await kernel.job("stream"))["state"] == "paused"
        assert await kernel.write(".cowfs/vm/stream", "pause") == errno.EINVAL
        assert await kernel.read(".cowfs/vm/error") == "cannot pause a stream job that is paused\n"
        assert await kernel.write(".cowfs/vm/stream", "complete") == errno.EINVAL
        assert await kernel.read(".cowfs/vm/error") == ("cannot complete a stream job that is paused\n")
        assert await kernel.write(".cowfs/vm/stream", "resume") == 0
        assert await kernel.write(".cowfs/vm/stream", "cancel") == 0
        job = await kernel.job("stream")
        assert (job["state"], job["resumes"]) == ("cancelled", "no")
        assert await kernel.read(".cowfs/vm/copy-on-read") == "off\n"
        assert await kernel.write(".cowfs/vm/stream", "start") == 0
        await kernel.mount.images["vm"].jobs.jobs["stream"].wait()
        job = await kernel.job("stream")
        assert (job["state"], job["offset"], job["percent"]) == ("completed", str(SIZE), "100.0")
        assert len((await kernel.read(".cowfs/vm/chain")).splitlines()) == 1
        assert await kernel.write(".cowfs/vm/commit", "start") == errno.EINVAL
        assert await kernel.read(".cowfs/vm/error") == f"{chain}: there is no backing file to commit into\n"


async def test_poll_wakes_at_every_change_of_state(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        operations, inode = kernel.operations, await kernel.inode(".cowfs/vm/stream")
        handle = await kernel.open(".cowfs/vm/stream")
        waiter = Waiter()

        async def poll() -> int:
            return await operations.poll(inode, handle, cast("pyfuse3.PollHandle", waiter), NOBODY)

        assert await poll() & select.POLLPRI, "what was never read counts as changed"
        for number, command in enumerate(["start speed=1k", "pause", "resume", "cancel"], start=1):
            await operations.read(handle, 0, 4096)
            assert not await poll() & (select.POLLPRI | select.POLLERR)
            assert await poll() & select.POLLIN
            assert await kernel.write(".cowfs/vm/stream", command) == 0
            assert await poll() & select.POLLPRI
            assert waiter.calls == number
        await operations.release(handle)


async def test_a_reader_sees_one_snapshot(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        operations = kernel.operations
        handle = await kernel.open(".cowfs/vm/copy-on-read")
        assert bytes(await operations.read(handle, 0, 1)) == b"o"
        assert await kernel.write(".cowfs/vm/copy-on-read", "off") == 0
        assert bytes(await operations.read(handle, 1, 100)) == b"n\n"
        assert bytes(await operations.read(handle, 0, 100)) == b"off\n"
        assert bytes(await operations.read(handle, 4, 100)) == b""
        await operations.release(handle)


async def test_images_come_and_go(chain: Path, raw_image: Path, tmp_path: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        control = ".cowfs/control"
        before = await kernel.inode("vm")
        assert await kernel.write(control, f"add second={raw_image} format=raw\n") == 0
        assert await kernel.read(control) == f"vm {chain}\nsecond {raw_image}\n"
        assert await kernel.write(control, f"add {raw_image}") == errno.EBUSY
        assert "is part of the disk 'second'" in await kernel.read(".cowfs/error")
        handle = await kernel.open("second")
        assert await kernel.write(control, "remove second") == errno.EBUSY
        assert await kernel.read(".cowfs/error") == "'second' is open\n"
        inode = await kernel.inode("second")
        await kernel.operations.release(handle)
        assert await kernel.write(control, "remove second") == 0
        assert await kernel.read(".cowfs/error") == ""
        with pytest.raises(pyfuse3.FUSEError):
            await kernel.operations.lookup(pyfuse3.ROOT_INODE, b"second", NOBODY)
        with_space = tmp_path / "two words.raw"
        await trio.Path(raw_image).rename(with_space)
        assert await kernel.write(control, f"add second={with_space} ro format=raw") == 0
        assert await kernel.inode("second") > inode, "inode numbers are not used twice"
        assert await kernel.inode("vm") == before
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await kernel.open("second", os.O_RDWR)
        assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize(
    ("text", "number", "sentence"),
    [
        ("", errno.EINVAL, "'' is no command; write one of: add"),
        ("add", errno.EINVAL, "'add' is no command"),
        ("mount /x", errno.EINVAL, "'mount /x' is no command"),
        ("remove other", errno.ENOENT, "there is no disk 'other'"),
        ("add vm.raw", errno.EINVAL, "'vm.raw' is no absolute path"),
        ("add /none/x.raw", errno.ENOENT, "/none/x.raw: cannot open: No such file or directory"),
        ("add vm=/none/x.raw", errno.EINVAL, "there is a disk 'vm' already"),
        ("add .cowfs=/none/x.raw", errno.EINVAL, "'.cowfs' cannot be the name of a disk"),
        ("add control=/none/x.raw", errno.EINVAL, "'control' cannot be the name of a disk"),
        ("add /nowhere/vm", errno.EPERM, "/nowhere/vm: lies inside the mount /nowhere"),
        ("add x=/etc/passwd format=vmdk", errno.EINVAL, "/etc/passwd: unknown format 'vmdk'"),
    ],
)
async def test_refused_images_say_why(chain: Path, text: str, number: int, sentence: str) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        if text == "add /nowhere/vm":
            text = "add other=/nowhere/vm"
        assert await kernel.write(".cowfs/control", text) == number
        assert (await kernel.read(".cowfs/error")).startswith(sentence)


async def test_a_base_that_others_use_takes_no_commit(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    for name in ("vm", "other"):
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / f"{name}.qcow2"))
    async with serving(Source(f"{tmp_path}/vm.qcow2"), Source(f"{tmp_path}/other.qcow2")) as kernel:
        assert await kernel.write(".cowfs/vm/commit", "start") == errno.EBUSY
        assert await kernel.read(".cowfs/vm/error") == f"its backing file {base} is in use by 'other'\n"
        assert await kernel.write(".cowfs/control", f"add base={base}") == errno.EBUSY
        assert await kernel.write(".cowfs/control", "remove other") == 0
        assert await kernel.write(".cowfs/vm/commit", "start") == 0
        await kernel.mount.images["vm"].jobs.jobs["commit"].wait()
        assert (await kernel.job("commit"))["state"] == "completed"


async def test_a_read_only_mount_takes_no_jobs(chain: Path) -> None:
    async with serving(Source(str(chain), "vm"), settings=Settings(read_only=True)) as kernel:
        for file, text in (("stream", "start"), ("commit", "start"), ("copy-on-read", "on")):
            assert await kernel.write(f".cowfs/vm/{file}", text) == errno.EROFS
            assert "is open read-only" in await kernel.read(".cowfs/vm/error")
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await kernel.open("vm", os.O_WRONLY)
        assert caught.value.errno == errno.EROFS


async def test_flat_file(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        operations = kernel.operations
        handle = await kernel.open("vm", os.O_RDWR)
        assert await operations.write(handle, SIZE - 3, b"end") == 3
        assert bytes(await operations.read(handle, SIZE - 4, 100))[1:] == b"end"
        assert bytes(await operations.read(handle, SIZE, 100)) == b""
        assert len(await operations.read(handle, 0, 4 << 20)) == 4 << 20
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.write(handle, SIZE - 1, b"beyond")
        assert caught.value.errno == errno.EFBIG
        assert "write beyond the end of the disk" in await kernel.read(".cowfs/vm/error")
        await operations.fsync(handle, False)
        await operations.flush(handle)
        assert kernel.mount.images["vm"].disk.stats.flushes == 2
        await operations.release(handle)
        reader = await kernel.open("vm")
        await operations.flush(reader)
        assert kernel.mount.images["vm"].disk.stats.flushes == 2, "nothing to flush for a reader"
        await operations.release(reader)


class Change:
    """Stands for pyfuse3's SetattrFields."""

    def __init__(self, **fields: bool) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        return self._fields.get(name, False)


async def test_a_size_that_the_kernel_is_only_to_be_told_of_changes_nothing(chain: Path) -> None:
    """Whoever corrects the kernel after a write beyond the end may have an old size in hand."""
    async with serving(Source(str(chain), "vm")) as kernel:
        operations, flat = kernel.operations, await kernel.inode("vm")
        disk = kernel.mount.images["vm"].disk
        kernel.mount.images["vm"].allow_shrink = True
        size = disk.size
        attr = pyfuse3.EntryAttributes()
        attr.st_size = size // 2
        fields: Any = Change(update_size=True)
        operations.correctors.add(77)
        answer = await operations.setattr(flat, attr, fields, None, cast("Any", SimpleNamespace(pid=77)))
        assert (answer.st_size, disk.size) == (size, size)
        answer = await operations.setattr(flat, attr, fields, None, cast("Any", SimpleNamespace(pid=78)))
        assert (answer.st_size, disk.size) == (size // 2, size // 2)


async def test_attributes_that_can_be_set(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        operations, flat = kernel.operations, await kernel.inode("vm")
        status = await kernel.inode(".cowfs/vm/status")

        async def change(inode: int, **values: int) -> pyfuse3.EntryAttributes:
            attr = pyfuse3.EntryAttributes()
            for name, value in values.items():
                setattr(attr, name, value)
            fields: Any = Change(**{"update_" + name.split("_")[1]: True for name in values})
            return await operations.setattr(inode, attr, fields, None, NOBODY)

        async def refused(inode: int, **values: int) -> None:
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await change(inode, **values)
            assert caught.value.errno == errno.EPERM

        assert (await change(flat, st_size=SIZE)).st_size == SIZE
        assert (await change(flat, st_size=2 * SIZE)).st_size == 2 * SIZE
        await refused(flat, st_size=SIZE)
        assert f"only grow, not shrink from {2 * SIZE} bytes" in await kernel.read(".cowfs/vm/error")
        assert (await change(status, st_size=0)).st_size == 0
        await refused(status, st_size=1)
        assert (await change(flat, st_mtime_ns=5)).st_mtime_ns == 5
        await change(flat, st_mode=0o100600, st_uid=os.getuid(), st_gid=os.getgid())
        await refused(flat, st_mode=0o100644)
        await refused(flat, st_uid=os.getuid() + 1)
        await refused(flat, st_gid=os.getgid() + 1)
        blocks = sum(path.stat().st_blocks for path in chain.parent.iterdir())
        found = await operations.getattr(flat, NOBODY)
        assert found.st_blocks == blocks
        # the kernel must not ask again while requests are under way, but does when somebody looks up the name
        assert found.attr_timeout > 86400
        assert found.entry_timeout <= 1


@pytest.mark.parametrize("name", ["create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename"])
async def test_nothing_is_made_or_removed(chain: Path, name: str) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await getattr(kernel.operations, name)(pyfuse3.ROOT_INODE, b"vm", NOBODY)
        assert caught.value.errno == errno.EPERM
        assert (await kernel.read(".cowfs/error")).startswith("files come and go with the images")


async def test_space_of_the_host(chain: Path) -> None:
    async with serving(Source(str(chain), "vm")) as kernel:
        answer, host = await kernel.operations.statfs(NOBODY), os.statvfs(chain)
        assert answer.f_bsize == 65536
        assert answer.f_blocks == host.f_blocks * host.f_frsize // 65536
    async with serving() as kernel:
        assert (await kernel.operations.statfs(NOBODY)).f_blocks == 0

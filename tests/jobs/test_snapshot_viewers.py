"""Internal snapshots keep what they take from backing files, whatever is done to the chain; QEMU is the judge."""

import json
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from chains import K, M, Writer, completed, view
from commandline import PATIENCE, ok, qemu_img, qemu_io
from imagetools import assert_clean, commands, image_at, qemu_content, qemu_snapshots

from cowfs.block.disk import Disk
from cowfs.block.image import Backing
from cowfs.block.snapshots import Fill
from cowfs.errors import Busy, CorruptImage, Unsupported
from cowfs.formats.chain import open_disk
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.rebase import rebase
from cowfs.jobs.commit import Commit, Pivot
from cowfs.jobs.job import Job, State
from cowfs.jobs.stream import Stream

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 6 * M

#: format, options, and bytes of the disk, of each layer, deepest first
CHAINS: Mapping[str, list[tuple[str, dict[str, object], int]]] = {
    "plain": [("raw", {}, SIZE), ("qcow2", {}, SIZE), ("qcow2", {}, SIZE)],
    "small": [("qcow2", {}, SIZE), ("qcow2", {"cluster_size": 4096}, SIZE), ("qcow2", {"cluster_size": 512}, SIZE)],
    "extended": [("qed", {}, SIZE)] + [("qcow2", {"extended_l2": "on", "cluster_size": "128k"}, SIZE)] * 2,
    "old": [("qcow2", {"compat": "0.10"}, SIZE)] * 3,
    "growing": [("qcow2", {}, 2 * M), ("qcow2", {}, 3 * M + 512), ("qcow2", {"cluster_size": 16384}, SIZE)],
    "shrinking": [("raw", {}, SIZE), ("qcow2", {}, 5 * M + 512), ("qcow2", {}, 3 * M)],
}

#: which layers have snapshots, deepest first
Snapshots = tuple[int, ...]


class Files:
    """A chain some of whose layers have internal snapshots, and what these are; layers by number, 0 the deepest."""

    def __init__(self, folder: Path, chain: str, where: Snapshots, seed: int) -> None:
        rnd = random.Random(f"{chain} {seed}")
        folder.mkdir(exist_ok=True)
        self.formats = [format for format, _, _ in CHAINS[chain]]
        self.paths = [folder / f"layer{number}.{format}" for number, format in enumerate(self.formats)]
        for number, (format, options, size) in enumerate(CHAINS[chain]):
            path = self.paths[number]
            words = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
            if number:
                words += ["-b", self.paths[number - 1].name, "-F", self.formats[number - 1]]
            ok(qemu_img("create", "-q", "-f", format, *words, path, str(size)))
            old = options.get("compat") == "0.10"
            if format == "qcow2":
                place = rnd.randrange(size // 131072) * 131072
                qemu_io(path, format, f"write -c -P {rnd.randrange(1, 256)} {place} 128k")
            self._write(rnd, number, size, 5 if number else 12, old=old)
            if number not in where:
                continue
            for name in ("one", "two"):
                ok(qemu_img("snapshot", "-c", name, path))
                if name == "one" and not old:
                    size = rnd.choice([size, size + M, size - M])
                    ok(qemu_img("resize", "-q", "--shrink", path, str(size)))
                self._write(rnd, number, size, 4, old=old)
        self.kept = {(number, name): self.snapshot(number, name) for number in where for name in ("one", "two")}
        self.views = [view(path, format) for path, format in zip(self.paths, self.formats, strict=True)]

    def _write(self, rnd: random.Random, number: int, size: int, count: int, *, old: bool) -> None:
        format = self.formats[number]
        words = commands(rnd, size, count, zeroes=format == "qcow2" and not old)
        qemu_io(self.paths[number], format, *words)

    @property
    def top(self) -> Path:
        return self.paths[-1]

    def snapshot(self, number: int, name: str) -> bytes | None:
        """The disk that QEMU makes of a copy of a layer by going back to a snapshot; None if it is refused."""
        copy = self.paths[number].with_name("copy.qcow2")
        shutil.copyfile(self.paths[number], copy)
        applied = qemu_img("snapshot", "-a", name, copy)
        return view(copy, "qcow2") if applied.returncode == 0 else None

    def lost(self) -> list[tuple[int, str]]:
        """Snapshots that are not what they were, in the order of the layers."""
        return [(number, name) for (number, name), kept in self.kept.items() if self.snapshot(number, name) != kept]

    def contents(self) -> list[bytes]:
        return [path.read_bytes() for path in self.paths]

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Disk]:
        disk = await open_disk(str(self.top), self.formats[-1], writable=True, copy_on_read=False)
        try:
            yield disk
        finally:
            await disk.close()

    def check(self) -> None:
        for path, format in zip(self.paths, self.formats, strict=True):
            if format != "raw":
                # also where the name of the backing file says that it is of no use any more
                alone = {"driver": format, "file.filename": str(path), "backing": None}
                ok(qemu_img("check", "-q", f"json:{json.dumps(alone)}"))


def job(make: Callable[[Disk], Job]) -> Callable[[Files], Awaitable[None]]:
    """Run a job on the chain as the command line does."""

    async def run(files: Files) -> None:
        async with files.opened() as disk:
            made = make(disk)
            await made.require_harmless()
            await completed(made)

    return run


async def onto_the_deepest(files: Files) -> None:
    await rebase(str(files.top), "qcow2", Backing(files.paths[0].name, files.formats[0]), lambda *_: None)


async def onto_none(files: Files) -> None:
    await rebase(str(files.top), "qcow2", None, lambda *_: None)


WORK: Mapping[str, Callable[[Files], Awaitable[None]]] = {
    "stream": job(lambda disk: Stream(disk, alone=True)),
    "stream-base": job(lambda disk: Stream(disk, base=disk.layers[-1], alone=True)),
    "commit": job(lambda disk: Commit(disk, alone=True)),
    "commit-deep": job(lambda disk: Commit(disk, base=disk.layers[-1], alone=True)),
    "commit-keep": job(lambda disk: Commit(disk, base=disk.layers[-1], keep=True)),
    "commit-between": job(lambda disk: Commit(disk, top=disk.layers[1], alone=True)),
    "rebase": onto_the_deepest,
    "rebase-none": onto_none,
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("chain", CHAINS)
async def test_snapshots_of_the_active_layer_are_kept(tmp_path: Path, chain: str, work: str) -> None:
    files = Files(tmp_path, chain, (2,), 1)
    await WORK[work](files)
    assert files.lost() == []
    files.check()
    assert view(files.top, "qcow2") == files.views[-1]
    for name in ("two", "one"):
        async with image_at(files.top) as image:
            await image.apply_snapshot(name)
        assert view(files.top, "qcow2") == files.kept[2, name]
        assert_clean(files.top)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("chain", CHAINS)
async def test_who_would_lose_nothing_is_left_alone(
    tmp_path: Path, chain: str, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are given something are those that lose something if they are not."""
    files = Files(tmp_path, chain, (2,), 2)
    given: list[tuple[int, str]] = []

    async def give_nothing(image: Qcow2Image, fills: Sequence[Fill]) -> None:
        given.extend((2, fill.snapshot.name) for fill in fills)

    monkeypatch.setattr(Qcow2Image, "fill_snapshots", give_nothing)
    await WORK[work](files)
    assert files.lost() == given
    assert view(files.top, "qcow2") == files.views[-1]


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("chain", ["small", "old", "growing"])
async def test_snapshots_of_the_base_are_its_own(tmp_path: Path, chain: str, work: str) -> None:
    """A base of version 2 that would have to grow is refused, as ever; then nothing of it has changed."""
    files = Files(tmp_path, chain, (0,), 3)
    try:
        await WORK[work](files)
    except Unsupported:
        assert chain == "old"
    assert files.lost() == []
    files.check()
    assert view(files.top, "qcow2") == files.views[-1]


#: what writes to a layer between the others, or makes it worth nothing
SPENDING = ("commit-deep", "commit-between", "commit-keep")


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("chain", CHAINS)
async def test_snapshots_of_a_layer_between(tmp_path: Path, chain: str, work: str) -> None:
    if CHAINS[chain][1][0] != "qcow2":
        pytest.fail("there is nothing to try")
    files = Files(tmp_path, chain, (1,), 4)
    before = files.contents()
    try:
        await WORK[work](files)
    except Busy as error:
        assert work in SPENDING
        assert files.contents() == before
        assert error.file == str(files.paths[1])
        assert "internal snapshots 'one', 'two'" in error.message
        assert error.message.endswith("and delete them then")
        return
    assert work not in SPENDING
    assert files.lost() == []
    files.check()
    assert view(files.top, "qcow2") == files.views[-1]


@pytest.mark.parametrize("pivot", [Pivot.YES, Pivot.WAIT])
async def test_a_pivot_leaves_no_snapshots_behind(tmp_path: Path, pivot: Pivot) -> None:
    files = Files(tmp_path, "old", (2,), 5)
    before = files.contents()
    async with files.opened() as disk:
        made = Commit(disk, pivot=pivot, alone=True)
        with trio.fail_after(PATIENCE):
            await made.run()
    assert made.state is State.FAILED
    assert made.error == (
        f"{files.top}: is left behind by this, and its internal snapshots 'one', 'two' with it; delete them first, or"
        " make images of their own of them with 'cowfs convert -l', and delete them then"
    )
    assert files.contents() == before


LIVE: Mapping[str, Callable[[Disk], Job]] = {
    "stream": Stream,
    "stream-base": lambda disk: Stream(disk, base=disk.layers[-1]),
    "commit": Commit,
    "commit-between": lambda disk: Commit(disk, top=disk.layers[1]),
}


async def beside_guests(path: Path, content: bytes, make: Callable[[Disk], Job]) -> tuple[Job, bytes]:
    """Let a job work under a guest; the job, and what the disk is then."""
    disk = await open_disk(str(path), writable=True, copy_on_read=False)
    try:
        writer = Writer(disk, content)
        async with trio.open_nursery() as nursery:
            await nursery.start(disk.run)
            nursery.start_soon(writer.run)
            made = make(disk)
            await made.run()
            nursery.cancel_scope.cancel()
    finally:
        await disk.close()
    return made, bytes(writer.model)


@pytest.mark.parametrize("work", LIVE)
@pytest.mark.parametrize("chain", CHAINS)
async def test_beside_guests_it_is_refused(tmp_path: Path, chain: str, work: str) -> None:
    files = Files(tmp_path, chain, (2,), 6)
    below = files.contents()[:-1]
    made, content = await beside_guests(files.top, files.views[-1], LIVE[work])
    if made.state is State.FAILED:
        assert made.error.startswith(f"{files.top}: its internal snapshot")
        assert made.error.endswith(", or do this while the disk is not mounted")
        assert files.contents()[:-1] == below
    else:
        assert work == "commit-between"
        assert made.state is State.COMPLETED
    assert files.lost() == []
    assert view(files.top, "qcow2") == content
    files.check()


@pytest.mark.parametrize("work", LIVE)
@pytest.mark.parametrize("written", [2 * M, SIZE])
async def test_beside_guests_snapshots_that_need_nothing_are_in_nobody_s_way(
    tmp_path: Path, work: str, written: int
) -> None:
    """Where a snapshot holds nothing and nothing is below, only a commit may put something there."""
    paths = [tmp_path / f"{number}.qcow2" for number in range(3)]
    for number, path in enumerate(paths):
        backing = ["-b", paths[number - 1].name, "-F", "qcow2"] if number else []
        ok(qemu_img("create", "-q", "-f", "qcow2", *backing, path, str(SIZE)))
        qemu_io(path, "qcow2", f"write -P {number + 1} 0 {written}")
    top = paths[-1]
    ok(qemu_img("snapshot", "-c", "whole", top))
    kept = qemu_content(top)
    qemu_io(top, "qcow2", "discard 0 1M", "write -P 9 1M 1M")
    made, content = await beside_guests(top, qemu_content(top), LIVE[work])
    refused = work == "commit" and written < SIZE
    assert made.state is (State.FAILED if refused else State.COMPLETED), made.error
    assert qemu_content(top, "-l", "whole") == kept
    assert view(top, "qcow2") == content
    assert_clean(top)


async def test_what_snapshots_share_is_copied_once(tmp_path: Path) -> None:
    """Twenty snapshots that take all from the backing file, some by tables of their own: one copy of it."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", top, str(SIZE)))
    for number in range(20):
        if number % 4 == 0:
            qemu_io(top, "qcow2", f"write -P {number + 1} {number << 16} 64k")
        ok(qemu_img("snapshot", "-c", f"s{number}", top))
    kept = [qemu_content(top, "-l", f"s{number}") for number in range(20)]
    content = qemu_content(top)
    await rebase(str(top), "qcow2", None, lambda *_: None)
    base.unlink()
    assert [qemu_content(top, "-l", f"s{number}") for number in range(20)] == kept
    assert qemu_content(top) == content
    assert_clean(top)
    # one for the snapshots, one for the disk
    assert top.stat().st_size < 2 * SIZE + 3 * M
    for number in range(20):
        ok(qemu_img("snapshot", "-d", f"s{number}", top))
        assert_clean(top)
    assert qemu_content(top) == content


@pytest.mark.parametrize("bits", [2, 4])
async def test_counts_that_are_narrow_share_as_much_as_they_can(tmp_path: Path, bits: int) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(random.Random(1).randbytes(M))
    options = f"refcount_bits={bits},cluster_size=4k"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", base.name, "-F", "raw", top, str(M)))
    for number in range(32):
        ok(qemu_img("snapshot", "-c", f"s{number}", top))
    await rebase(str(top), "qcow2", None, lambda *_: None)
    assert all(qemu_content(top, "-l", f"s{number}") == base.read_bytes() for number in range(32))
    assert_clean(top)
    copies = -(-32 // ((1 << bits) - 1))
    assert top.stat().st_size < (copies + 1) * (M + 100 * K)


async def test_what_qemu_recorded_of_a_snapshot_stays(tmp_path: Path) -> None:
    files = Files(tmp_path, "small", (2,), 7)
    before = qemu_snapshots(files.top)
    await onto_none(files)
    assert qemu_snapshots(files.top) == before


async def test_damaged_snapshots_are_told_of_before_anything_is_done(tmp_path: Path) -> None:
    files = Files(tmp_path, "small", (2,), 8)
    data = bytearray(files.top.read_bytes())
    place = int.from_bytes(data[64:72], "big")
    data[place : place + 8] = (3 << 62).to_bytes(8, "big")
    files.top.write_bytes(data)
    async with files.opened() as disk:
        with pytest.raises(CorruptImage):
            await Stream(disk, alone=True).require_harmless()
    assert files.top.read_bytes() == data


async def test_names_are_told_in_one_line(tmp_path: Path) -> None:
    files = Files(tmp_path, "plain", (2,), 9)
    async with image_at(files.top) as image:
        for number in range(8):
            await image.create_snapshot(f"n{number}\nx", (0, 0))
    async with files.opened() as disk:
        with pytest.raises(Busy) as caught:
            await Commit(disk).require_harmless()
    names = "'one', 'two', " + ", ".join(f"'n{number}?x'" for number in range(6))
    assert f"its internal snapshots {names} and 2 more would lose what they take" in str(caught.value)
    assert "\n" not in str(caught.value)

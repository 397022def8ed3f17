"""Several guests of one disk, who know what they wrote, and somebody who changes the disk under them meanwhile."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from commandline import ok, qemu_img
from crashing import Guest as Model
from directio import Direct, require_whole
from fallocating import PUNCH_HOLE, fallocate
from mounting import Mounted, wait_for

K, MIB = 1 << 10, 1 << 20
PAGE = 4 * K
#: bytes of the clusters, and of what one table of qcow2 is for
CLUSTER, SPAN = 16 * K, 32 * MIB
#: places with blocks of all guests; they have more tables than there is room for in the smallest cache
PLACES = 112
GUESTS = 4
#: bytes: whole pages, but no whole clusters, so that guests share those
BLOCK = 20 * K
#: bytes of the disk; behind the smaller size is nothing of the guests
SMALL, LARGE = PLACES * SPAN, (PLACES + 2) * SPAN

#: what the kernel says of requests when the server is gone; EIO of direct writes and dirty pages
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)


def blocks_of(guest: int) -> list[int]:
    """Where a guest's blocks are on the disk."""
    return [place * SPAN + (place * 7 % 50) * PAGE + guest * BLOCK for place in range(PLACES)]


class Guest:
    """One who writes, reads back, discards and flushes; even ones go past the kernel's cache."""

    def __init__(self, number: int, content: bytes, seed: int) -> None:
        self.blocks = blocks_of(number)
        self._is_direct = number % 2 == 0
        self._chooser = random.Random(f"{seed} {number}")
        self.begin_with(content)
        #: whether the server may be gone
        self.is_doomed = False

    def begin_with(self, content: bytes) -> None:
        """All blocks, one after the other, and nothing else is possible."""
        self._model = Model(content)
        self.flushes = 0

    def open(self, flat: Path) -> None:
        self._disk = Direct(flat)
        self._descriptor = self._disk.descriptor if self._is_direct else os.open(flat, os.O_RDWR)

    def close(self) -> None:
        """Close what is open; who opens again may expect a server."""
        for descriptor in {self._disk.descriptor, self._descriptor}:
            try:
                os.close(descriptor)
            except OSError as error:
                assert self.is_doomed, error
                assert error.errno in GONE, error
        self.is_doomed = False

    def work(self, _: int) -> bool:
        """Do something; False if the server is gone."""
        act = self._chooser.choices([self._write, self._read, self._discard, self._sync], [8, 4, 1, 2])[0]
        try:
            act()
        except OSError as error:
            if self.is_doomed and error.errno in GONE:
                return False
            raise
        return True

    def _somewhere(self) -> tuple[int, int, int]:
        """Some pages: where on the disk, where in the model, and how many bytes."""
        block = self._chooser.randrange(PLACES)
        start = self._chooser.randrange(BLOCK // PAGE) * PAGE
        length = self._chooser.randrange(PAGE, BLOCK - start + PAGE, PAGE)
        return self.blocks[block] + start, block * BLOCK + start, length

    def _write(self) -> None:
        place, at, length = self._somewhere()
        data = self._chooser.randbytes(length)
        self._model.note(at, data)
        if self._is_direct:
            self._disk.write(place, data)
        else:
            require_whole(os.pwrite(self._descriptor, data, place), length)

    def _read(self) -> None:
        place, at, length = self._somewhere()
        found = self._disk.read(place, length) if self._is_direct else os.pread(self._descriptor, length, place)
        require_whole(len(found), length)
        assert found == self._model.now[at : at + length], place

    def _discard(self) -> None:
        place, at, length = self._somewhere()
        self._model.note(at, bytes(length))
        fallocate(self._descriptor, PUNCH_HOLE, place, length)

    def _sync(self) -> None:
        gone = self._model.mark()
        os.fsync(self._descriptor)
        self.flushes += 1
        self._model.acknowledge(gone, self.flushes)

    def verify_live(self) -> None:
        """Everything is there, as the server has it; to be called while nothing else is done."""
        for number, place in enumerate(self.blocks):
            assert self._disk.read(place, BLOCK) == self._model.now[number * BLOCK : (number + 1) * BLOCK], place

    def verify(self, disk: Path, *, killed: bool) -> None:
        """Hold it against a raw file; after a kill, what an fsync acknowledged is there. That is what it has now."""
        content = read_blocks(disk, self.blocks)
        if killed:
            self._model.verify(self.flushes, content)
        else:
            assert content == self._model.now
        self.begin_with(content)


def read_blocks(disk: Path, blocks: list[int]) -> bytes:
    with disk.open("rb") as file:
        return b"".join(os.pread(file.fileno(), BLOCK, place) for place in blocks)


def make_base(path: Path, seed: int) -> None:
    """A raw image with half of all blocks."""
    chooser = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(LARGE)
        for guest in range(GUESTS):
            for place in blocks_of(guest)[guest % 2 :: 2]:
                os.pwrite(file.fileno(), chooser.randbytes(BLOCK), place)


class Director:
    """Somebody who commands the disk ``d`` of a mount, one command after the other, as a seed decides."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._chooser = random.Random(seed)
        self._snapshots = 0
        self.mounted: Mounted

    def layers(self) -> list[tuple[Path, str]]:
        """Files and formats, the active one first."""
        lines = self.mounted.control("d", "chain").read_text().splitlines()
        return [(Path(line.split(" ", 3)[3]), line.split(" ", 3)[1]) for line in lines]

    def act(self) -> None:
        """Give a command, and see to the end of what it does."""
        acts: list[Callable[[], None]] = [self.shrink_and_grow, self.switch_copying, self.add_and_remove]
        # a chain of one has nothing to merge, a long one is enough
        depth = len(self.layers())
        acts += [self.snapshot] * (3 if depth < 4 else 0)
        acts += [self.job] * (4 if depth > 1 else 0)
        self._chooser.choice(acts)()

    def snapshot(self) -> None:
        self._snapshots += 1
        format = self._chooser.choice(["qcow2", "qed"])
        self._command("snapshot", f"create new{self._snapshots}.{format} format={format}")

    def _command(self, file: str, text: str, name: str = "d") -> None:
        self.mounted.control(name, file).write_text(text)

    def begin_job(self) -> str:
        """Start a job that leaves the active layer where it is; its verb."""
        verb = self._chooser.choice(["stream", "commit"])
        keys = self._chooser.choice(["", " base=0"]) if len(self.layers()) > 2 else ""
        self._command(verb, f"start{keys}")
        return verb

    def see_to_the_end(self) -> None:
        """Wait until no job goes on, be it one that has been taken up from before."""
        for verb in ("stream", "commit"):
            wait_for(f"the {verb}", lambda verb=verb: self.mounted.job("d", verb)["resumes"] == "no")  # type: ignore[misc]

    def job(self) -> None:
        """Have a job done, perhaps paused meanwhile, or cancelled."""
        verb = self.begin_job() if self._chooser.random() < 0.6 else self._begin_pivot()
        how = self._chooser.choice(["run", "pause", "cancel", "shrink"])
        if how in ("pause", "cancel"):
            self._steer(verb, how)
        if how == "shrink":
            self._refused_shrink(verb)
        if self.mounted.job("d", verb)["state"] == "paused":
            self._steer(verb, "resume")
        self.see_to_the_end()
        facts = self.mounted.job("d", verb)
        assert facts["state"] == "completed" or (facts["state"], how) == ("cancelled", "cancel"), facts

    def _begin_pivot(self) -> str:
        self._command("commit", "start pivot=yes")
        return "commit"

    def _steer(self, verb: str, word: str) -> None:
        try:
            self._command(verb, word)
        except OSError:
            assert self.mounted.job("d", verb)["state"] == "completed"

    def _refused_shrink(self, verb: str) -> None:
        try:
            os.truncate(self.mounted.flat("d"), SMALL)
        except OSError as error:
            assert error.errno in (errno.EBUSY, errno.EOPNOTSUPP), error
        else:
            assert self.mounted.job("d", verb)["state"] == "completed"
            os.truncate(self.mounted.flat("d"), LARGE)

    def shrink_and_grow(self) -> None:
        """What was behind the smaller size is gone then. QED cannot shrink."""
        flat = self.mounted.flat("d")
        can = self.layers()[0][1] == "qcow2"
        with Direct(flat) as disk:
            for place in (SMALL, SMALL + SPAN):
                disk.write(place, self._chooser.randbytes(2 * CLUSTER))
            if self._chooser.random() < 0.5:
                disk.sync()
            try:
                os.truncate(flat, SMALL)
            except OSError as error:
                assert (error.errno, can) == (errno.EOPNOTSUPP, False), error
                return
            assert os.fstat(disk.descriptor).st_size == SMALL
            os.truncate(flat, LARGE)
            for place in (SMALL, SMALL + SPAN):
                assert disk.read(place, 2 * CLUSTER) == bytes(2 * CLUSTER)

    def switch_copying(self) -> None:
        self._command("copy-on-read", self._chooser.choice(["on", "off"]))

    def add_and_remove(self) -> None:
        other = self._folder / "other.qcow2"
        if not other.exists():
            ok(qemu_img("create", "-q", "-f", "qcow2", other, "64M"))
        control = self.mounted.point / ".cowfs" / "control"
        control.write_text(f"add other={other}")
        with Direct(self.mounted.flat("other")) as disk:
            disk.write(0, b"x" * CLUSTER)
        control.write_text("remove other")

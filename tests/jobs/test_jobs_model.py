"""Jobs in any order, beside guests, against a model: no job may be seen through the disk.

Hypothesis chooses a chain of QEMU's making and what is done to it: reads and writes one by one and several at once,
streams and commits step by step, steered and broken off at any moment, snapshots, growth, restarts. After each of
them the disk is what the model says; whenever it is closed, so is every file to QEMU. ``COWFS_EXAMPLES`` asks for
more of it, not the same every time.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from chains import ChainFiles, K, Plan
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from jobmodel import World, fresh_bytes
from steadysteps import steady_steps
from stillness import StillLoop

from cowfs.block import metacache
from cowfs.block.alignment import align_down
from cowfs.errors import Busy, CowfsError, UsageError
from cowfs.jobs import commit, stream
from cowfs.jobs.job import State

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 1536 * K
#: bytes; so that jobs have many steps, batches and windows on small disks
STEP, BATCH, WINDOW = 64 * K, 192 * K, 512 * K
#: layers; a chain of so many gets no more
DEEPEST = 6
#: bytes; disks of so many grow no more
LARGEST = 3072 * K

PLANS: dict[str, Plan] = {
    "raw": [("raw", {}, SIZE)],
    "plain": [("raw", {}, SIZE), *[("qcow2", {}, SIZE)] * 3],
    "mixed": [
        ("qcow2", {"cluster_size": "256k"}, SIZE),
        ("qed", {}, SIZE),
        ("qcow2", {"cluster_size": 4096}, SIZE),
        ("qcow2", {"extended_l2": "on", "cluster_size": "64k"}, SIZE),
    ],
    "old": [("qed", {"cluster_size": 4096}, SIZE), ("qcow2", {"compat": "0.10"}, SIZE), ("qed", {}, SIZE)],
    "growing": [
        ("qcow2", {}, 512 * K),
        ("qcow2", {}, 800 * K + 512),
        ("qcow2", {"cluster_size": 16 * K}, 1300 * K + 3 * 512),
        ("qcow2", {"cluster_size": 4096}, SIZE),
    ],
    "shrinking": [
        ("raw", {}, SIZE),
        ("qcow2", {}, 800 * K + 512),
        ("qcow2", {"cluster_size": 16 * K}, 512 * K),
        ("qcow2", {}, 1300 * K),
    ],
    "small": [("qcow2", {"cluster_size": 512}, 300 * K), ("qcow2", {"cluster_size": 4096}, 300 * K)],
    # more tables than the smallest cache holds
    "tables": [("raw", {}, 400 * K), ("qcow2", {"cluster_size": 512, "refcount_bits": 64}, 700 * K)],
}
EXAMPLES = int(os.environ.get("COWFS_EXAMPLES", "25"))

#: bytes; how far from where a job is its surroundings reach, since that is where something can go wrong
NEAR = 256 * K
#: offset, its grain, and whether it is meant as one near the job
PLACES = st.tuples(st.integers(0, LARGEST - 1), st.sampled_from([1, 512, 4096, 64 * K]), st.booleans())
LENGTHS = st.sampled_from([1, 512, 3000, 4096, 4608, 64 * K, 70_000, 200_000])
#: what is done at once: each of it after letting others go first so many times
BUSY = st.lists(
    st.tuples(
        st.sampled_from(
            ["write"] * 4
            + ["read"] * 2
            + ["zero", "discard", "step", "flush", "look", "cancel", "pause", "resume", "grow"]
            + ["rest", "settle", "compact", "shrink", "flush_behind", "neighbour"]
        ),
        st.integers(0, 12),
        PLACES,
        LENGTHS,
    ),
    min_size=2,
    max_size=8,
)

Place = tuple[int, int, bool]
#: kind, others that go first, where, length
Thing = tuple[str, int, Place, int]
Templates = dict[str, ChainFiles]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return {name: ChainFiles(tmp_path_factory.mktemp(name), plan) for name, plan in PLANS.items()}


def jobs(machine: "JobsMachine") -> bool:
    return machine.world.running is not None


def no_jobs(machine: "JobsMachine") -> bool:
    return machine.world.running is None


def with_backing(machine: "JobsMachine") -> bool:
    return machine.world.running is None and len(machine.world.levels) > 1


def ready(machine: "JobsMachine") -> bool:
    running = machine.world.running
    return running is not None and running.job.state is State.READY


class JobsMachine(RuleBasedStateMachine):
    templates: Templates

    def __init__(self) -> None:
        super().__init__()
        self.loop: StillLoop | None = None
        self.images = 0
        #: whether nothing has gone wrong so far
        self.is_sound = True

    @initialize(
        plan=st.sampled_from(sorted(PLANS)),
        seed=st.integers(0, 1000),
        host=st.sampled_from(["warm", "cold", "held", "held"]),
        copy=st.booleans(),
    )
    def set_up(self, plan: str, seed: int, host: str, copy: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.loop = StillLoop(seed, cold=host == "cold", held=host == "held")
        self.world = World.copied(self.loop, self.templates[plan], Path(self.folder.name), copy_on_read=copy)
        self.loop.call(self.world.open)

    def teardown(self) -> None:
        if self.loop is None:
            return
        try:
            if self.is_sound:
                if self.world.running is not None:
                    self._finish()
                self._do(self.world.restart)
        finally:
            try:
                self.loop.close()
            finally:
                self.folder.cleanup()

    def _finish(self) -> None:
        """Let a job come to its end, by itself."""
        assert self.loop is not None
        running = self.world.running
        assert running is not None
        self.loop.tell(self.loop.steps.unbind)
        job = running.job
        for _ in range(1000):
            if not job.state.is_active:
                break
            if job.state is State.PAUSED:
                self.loop.call(self.world.command, running.verb, "resume")
            elif job.state is State.READY:
                self.loop.call(self.world.command, running.verb, "complete")
            else:
                self.loop.call(self.world.command, running.verb, "speed=0")
            self.loop.let_pass(1.0)
        self._do(trio.lowlevel.checkpoint)
        assert self.world.running is None, "a job does not come to its end"

    def _do(self, function: Callable[..., Any], *args: object) -> None:
        """Do it, and look at everything."""
        assert self.loop is not None
        world, holding = self.world, self.loop.holding
        is_over = world.running is not None and not world.running.job.state.is_active
        if not is_over and (holding is None or not holding.holds_any):
            # else a job may have come to its end before this, and have been held since
            world.mark, world.before = len(world.written), bytes(world.model)

        async def look() -> None:
            world.progress()
            await world.settle_job()
            await world.verify()

        self.is_sound = False
        self.loop.call(function, *args)
        self.loop.call(look)
        self.is_sound = True

    def _offset(self, place: Place) -> int:
        offset, grain, is_near = place
        size, running = len(self.world.model), self.world.running
        if is_near and running is not None:
            offset = max(0, min(size - 1, running.job.offset - NEAR + offset % (NEAR + NEAR // 2)))
        return align_down(offset % size, grain)

    async def _refused(self, error: type[CowfsError], sentence: str, attempt: Callable[[], Any]) -> None:
        with pytest.raises(error, match=sentence):
            await attempt()

    # -- guests

    @rule(place=PLACES, length=LENGTHS, zeros=st.booleans(), steps=st.integers(0, 2))
    def write(self, place: Place, length: int, zeros: bool, steps: int) -> None:
        """Write, when a job has made some steps."""
        if steps:
            self._do(self._steer, "step", steps)
        offset = self._offset(place)
        length = min(length, len(self.world.model) - offset)
        data = bytes(length) if zeros else fresh_bytes(len(self.world.written), length)
        self._do(self.world.write, offset, data)

    @rule(place=PLACES, length=LENGTHS, unmap=st.booleans())
    def zero(self, place: Place, length: int, unmap: bool) -> None:
        offset = self._offset(place)
        self._do(self.world.zero, offset, min(length, len(self.world.model) - offset), unmap)

    @rule(place=PLACES, length=LENGTHS)
    def read(self, place: Place, length: int) -> None:
        offset = self._offset(place)
        self._do(self.world.read, offset, min(length, len(self.world.model) - offset))

    @rule()
    def flush(self) -> None:
        self._do(self.world.disk.flush)

    @rule(number=st.integers(0, DEEPEST))
    def look(self, number: int) -> None:
        self._do(self.world.look, number, 0, LARGEST)

    @rule(seconds=st.sampled_from([0.2, 1.0, 6.0, 45.0]))
    def time_passes(self, seconds: float) -> None:
        assert self.loop is not None
        self.loop.let_pass(seconds)
        self._do(trio.lowlevel.checkpoint)

    @rule()
    def flush_behind(self) -> None:
        """One that may still be under way when the next things are done."""
        assert self.loop is not None
        self.loop.tell(self.world.flush_behind)

    @rule(what=st.sampled_from(["rest", "settle", "compact"]))
    def behind(self, what: str) -> None:
        self._do(self._behind, what)

    async def _behind(self, what: str) -> None:
        if what == "settle":
            await self.world.disk.settle()
        elif what == "compact":
            await self.world.compact()
        elif what == "rest":
            self.world.rest()
        else:
            self.world.flush_behind()

    @rule(number=st.integers(0, DEEPEST))
    def neighbour(self, number: int) -> None:
        self._do(self.world.neighbour, number)

    @rule(things=BUSY)
    def much_at_once(self, things: list[Thing]) -> None:
        self._do(self._at_once, things)

    async def _at_once(self, things: list[Thing]) -> None:
        world = self.world
        if self.loop is not None and world.running is not None:
            self.loop.steps.grant(len(things) // 2)
        taken: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            for number, (kind, delay, place, length) in enumerate(things):
                offset = self._offset(place)
                length = min(length, len(world.model) - offset)
                if kind in ("write", "zero", "discard"):
                    if any(start < offset + length and offset < end for start, end in taken):
                        continue
                    taken.append((offset, offset + length))
                if kind in ("rest", "settle", "compact", "flush_behind"):
                    nursery.start_soon(self._later, delay, partial(self._behind, kind))
                elif kind == "shrink":
                    nursery.start_soon(self._later, delay, partial(world.shrink_by, length))
                elif kind == "neighbour":
                    nursery.start_soon(self._later, delay, partial(world.neighbour, place[0]))
                elif kind in ("zero", "discard"):
                    nursery.start_soon(
                        self._later,
                        delay,
                        partial(self._if_there, offset, length, partial(world.zero, offset, length, kind == "discard")),
                    )
                elif kind == "write":
                    data = fresh_bytes(1000 * len(world.written) + number, length)
                    nursery.start_soon(
                        self._later, delay, partial(self._if_there, offset, length, partial(world.write, offset, data))
                    )
                elif kind == "read":
                    nursery.start_soon(
                        self._later, delay, partial(self._if_there, offset, length, partial(world.read, offset, length))
                    )
                elif kind == "look":
                    nursery.start_soon(self._later, delay, partial(world.look, place[0], offset, length))
                elif kind == "flush":
                    nursery.start_soon(self._later, delay, world.disk.flush)
                elif kind == "grow":
                    nursery.start_soon(self._later, delay, partial(world.grow_by, length, LARGEST))
                else:
                    nursery.start_soon(self._later, delay, partial(self._steer, kind, 1 + place[0] % 4))

    async def _if_there(self, offset: int, length: int, what: Callable[[], Any]) -> None:
        """Do something with a range, unless the disk has become too small for that."""
        if offset + length <= len(self.world.model):
            await what()

    async def _later(self, delay: int, what: Callable[[], Any]) -> None:
        for _ in range(delay):
            await trio.lowlevel.checkpoint()
        await what()

    async def _steer(self, kind: str, steps: int) -> None:
        """Steer the job, if there is one that can be steered so."""
        running = self.world.running
        if running is None or self.loop is None:
            return
        if kind == "step":
            self.loop.steps.grant(steps)
            return
        try:
            await self.world.command(running.verb, kind)
        except UsageError:
            assert (kind, running.job.state) not in [("pause", State.RUNNING), ("resume", State.PAUSED)]

    # -- jobs

    @precondition(with_backing)
    @rule(base=st.none() | st.integers(0, DEEPEST), speed=st.sampled_from([0, 0, 100_000]))
    def start_stream(self, base: int | None, speed: int) -> None:
        keys: dict[str, int | str] = {"speed": speed} if speed else {}
        if base is not None:
            keys["base"] = base % (len(self.world.levels) - 1)
        self._do(self.world.start, "stream", keys)

    @precondition(with_backing)
    @rule(
        top=st.none() | st.integers(0, DEEPEST),
        base=st.none() | st.integers(0, DEEPEST),
        pivot=st.sampled_from([None, "no", "yes", "wait"]),
        speed=st.sampled_from([0, 0, 100_000]),
    )
    def start_commit(self, top: int | None, base: int | None, pivot: str | None, speed: int) -> None:
        world = self.world
        deepest = len(world.levels) - 1
        keys: dict[str, int | str] = {"speed": speed} if speed else {}
        if top is not None:
            keys["top"] = top = 1 + top % deepest
        if base is not None:
            keys["base"] = base % (deepest if top is None else top)
        if pivot is not None and top in (None, deepest):
            base = int(keys.get("base", deepest - 1))
            if len(world.levels[base].view) > len(world.model) and pivot != "no":
                attempt = partial(world.start, "commit", {**keys, "pivot": pivot})
                self._do(self._refused, UsageError, "the disk would grow", attempt)
                return
            keys["pivot"] = pivot
        self._do(world.start, "commit", keys)

    @precondition(jobs)
    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        self._do(self._steer, "step", count)

    @precondition(jobs)
    @rule(kind=st.sampled_from(["pause", "resume", "cancel"]))
    def steer(self, kind: str) -> None:
        self._do(self._steer, kind, 0)

    @precondition(jobs)
    @rule(speed=st.sampled_from([0, 50_000, 10_000_000]))
    def set_speed(self, speed: int) -> None:
        running = self.world.running
        assert running is not None
        self._do(self.world.command, running.verb, f"speed={speed}")

    @precondition(ready)
    @rule()
    def complete(self) -> None:
        self._do(self.world.command, "commit", "complete")

    @precondition(jobs)
    @rule()
    def finish(self) -> None:
        assert self.loop is not None
        self._finish()
        self.loop.steps.unbounded = False

    @precondition(jobs)
    @rule()
    def what_a_job_keeps_out(self) -> None:
        for attempt in (
            partial(self.world.command, "stream", "start"),
            partial(self.world.served.put_overlay, "x", "qcow2"),
        ):
            self._do(self._refused, Busy, "a (stream|commit) job is", attempt)

    # -- the chain

    @precondition(no_jobs)
    @rule(format=st.sampled_from(["qcow2", "qed"]), things=BUSY)
    def snapshot(self, format: str, things: list[Thing]) -> None:
        if len(self.world.levels) >= DEEPEST:
            return
        self.images += 1
        self._do(self._snapshot_beside, f"overlay{self.images}.{format}", format, things)

    async def _snapshot_beside(self, name: str, format: str, things: list[Thing]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.world.snapshot, name, format)
            nursery.start_soon(self._at_once, [thing for thing in things if thing[0] != "look"])

    @rule(sectors=st.integers(1, 600))
    def grow(self, sectors: int) -> None:
        self._do(self.world.grow_by, sectors * 512, LARGEST)

    @precondition(no_jobs)
    @rule(sectors=st.integers(1, 600))
    def shrink(self, sectors: int) -> None:
        self._do(self.world.shrink_by, sectors * 512)

    @rule(on=st.booleans())
    def copy_on_read(self, on: bool) -> None:
        assert self.loop is not None
        self.world.copy_on_read = on
        self.loop.tell(self.world.served.set_copy_on_read, on)

    @rule(resume=st.sampled_from([True, True, True, False]))
    def restart(self, resume: bool) -> None:
        self._do(partial(self.world.restart, resume=resume))


@contextmanager
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        for name, value in (("FIRM_STEP", STEP), ("BATCH", BATCH), ("WINDOW", WINDOW)):
            patches.setattr(commit, name, value)
        patches.setattr(stream, "WINDOW", WINDOW)
        # who rests keeps nothing
        patches.setattr(metacache, "RESTING_BOUND", 0)
        steady_steps(patches, STEP)
        yield


def test_no_job_is_seen_through_a_disk(templates: Templates) -> None:
    machine = type("Jobs", (JobsMachine,), {"templates": templates})
    with small_steps():
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=40,
                deadline=None,
                derandomize="COWFS_EXAMPLES" not in os.environ,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            ),
        )

"""Mounts on a slow host: a call for a file is held at a gate, and everything else goes on meanwhile."""

import errno
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commandline import ok, qemu_img, qemu_io
from directio import CLUSTER, Blocks, Direct
from mounting import Mounted, Mounts, shell, wait_for, wait_for_end
from slowguests import CLUSTER as SMALL_CLUSTER
from slowguests import GUESTS, Director, Guest, blocks_of, make_base, read_blocks
from slowhost import SlowHost
from working import Call, Work, at_work

pytestmark = pytest.mark.needs("root", "fuse", "gcc", "qemu-img", "qemu-io")

MIB, GIB = 1 << 20, 1 << 30
FORMATS = ["qcow2", "qed"]


def errno_of(call: Call[Any]) -> int:
    """Wait for a call; 0, or the errno with which it failed."""
    try:
        call.result()
    except OSError as error:
        assert error.errno
        return error.errno
    return 0


def told(mounted: Mounted, file: str, text: str, name: str = "d") -> Call[int]:
    """Write to a control file of the disk, in a thread."""
    return Call(mounted.control(name, file).write_text, text)


def end(mounted: Mounted) -> None:
    mounted.umount()
    wait_for_end(mounted.process)


# -- flushes


@pytest.mark.parametrize("how", ["close", "periodic"])
def test_a_shrink_waits_for_a_flush(mount: Mounts, slow_host: SlowHost, tmp_path: Path, how: str) -> None:
    image = tmp_path / "disk.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "4G"))
    interval = 0.5 if how == "periodic" else 3600
    mounted = mount("-o", f"allow-shrink,flush-interval={interval}", f"d={image}", prefix=slow_host.prefix)
    flat, blocks = mounted.flat("d"), Blocks()
    with Direct(flat) as disk:
        # in three tables
        for number, offset in enumerate((0, 5 * CLUSTER, 600 * MIB, 1100 * MIB)):
            blocks.write(disk, offset, number + 1)
        other = os.open(flat, os.O_RDWR)
        with slow_host.flushes.held(image, calls=1):
            closing = Call(os.close, other) if how == "close" else None
            slow_host.flushes.has_arrived()
            shrink = Call(os.truncate, flat, 2 * GIB)
            shrink.goes_as_far_as_it_can(mounted)
        if closing is None:
            os.close(other)
        else:
            closing.result()
        shrink.result()
        disk.sync()
        assert blocks.shown_by(disk) == blocks.model
    assert flat.stat().st_size == 2 * GIB
    end(mounted)
    blocks.judge(image, "qcow2")


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_flush_is_writing_is_kept(mount: Mounts, slow_host: SlowHost, tmp_path: Path, format: str) -> None:
    """Guests need more tables than there is room for while a flush is under way."""
    span, tables = (512 * MIB, 24) if format == "qcow2" else (2 * GIB, 12)
    image = tmp_path / f"disk.{format}"
    ok(qemu_img("create", "-q", "-f", format, image, str(tables * span)))
    options = "flush-interval=3600,cache-size=1M"
    mounted = mount("-o", options, f"d={image}", prefix=slow_host.prefix)
    blocks = Blocks()
    with Direct(mounted.flat("d")) as disk:
        for number in range(tables):
            blocks.write(disk, number * span, number + 1)
        disk.sync()
        for number in range(0, tables, 4):
            blocks.write(disk, number * span + CLUSTER, 100 + number)
        # of close(2), since the kernel lets nobody write to a file that it has made durable
        other = os.open(mounted.flat("d"), os.O_RDWR)
        with slow_host.flushes.held(image, calls=1):
            closing = Call(os.close, other)
            slow_host.flushes.has_arrived()
            assert blocks.shown_by(disk) == blocks.model
            for number in range(0, tables, 4):
                blocks.write(disk, number * span + 2 * CLUSTER, 200 + number)
            assert blocks.shown_by(disk) == blocks.model
        closing.result()
        disk.sync()
        assert blocks.shown_by(disk) == blocks.model
    end(mounted)
    blocks.judge(image, format)


# -- what excludes each other


#: control file, what is written to it
EXCLUDED = [("stream", "start"), ("commit", "start pivot=yes"), ("commit", "start"), ("snapshot", "create new.qcow2")]


class Overlay:
    """An overlay of 64 MiB on a base, with something in each."""

    def __init__(self, folder: Path, format: str = "qcow2") -> None:
        self.base, self.path = folder / "base.qcow2", folder / f"top.{format}"
        self.format = format
        self.blocks = Blocks()
        self.blocks.model = dict.fromkeys(range(0, 2 * MIB, CLUSTER), 1)
        ok(qemu_img("create", "-q", "-f", "qcow2", self.base, "64M"))
        qemu_io(self.base, "qcow2", "write -P 1 0 2M")
        ok(qemu_img("create", "-q", "-f", format, "-b", self.base, "-F", "qcow2", self.path))

    def end(self, mounted: Mounted) -> None:
        """Unmount, and have QEMU judge what the active layer is by then."""
        active = Path(mounted.control("d", "chain").read_text().splitlines()[0].split(" ", 3)[3])
        end(mounted)
        self.blocks.judge(active, active.suffix[1:])


@pytest.fixture(params=FORMATS)
def overlay_of(request: pytest.FixtureRequest, tmp_path: Path) -> Overlay:
    return Overlay(tmp_path, request.param)


@pytest.mark.parametrize(("file", "text"), EXCLUDED)
def test_what_begins_while_a_shrink_waits(
    mount: Mounts, slow_host: SlowHost, tmp_path: Path, file: str, text: str
) -> None:
    overlay = Overlay(tmp_path)
    mounted = mount("-o", "allow-shrink,no-copy-on-read", f"d={overlay.path}", prefix=slow_host.prefix)
    flat = mounted.flat("d")
    with Direct(flat) as disk:
        overlay.blocks.write(disk, 8 * MIB, 2)
    with slow_host.flushes.held(overlay.path):
        shrink = Call(os.truncate, flat, 32 * MIB)
        slow_host.flushes.has_arrived()
        begun = told(mounted, file, text)
        begun.goes_as_far_as_it_can(mounted)
    outcome = errno_of(shrink), errno_of(begun)
    assert outcome in [(0, 0), (errno.EBUSY, 0), (0, errno.EBUSY)]
    if file != "snapshot" and not outcome[1]:
        assert mounted.job_ended("d", file)["state"] == "completed"
    assert flat.stat().st_size == (64 if outcome[0] else 32) * MIB
    # whatever was refused can be done now
    mounted.control("d", "stream").write_text("start")
    assert mounted.job_ended("d", "stream")["state"] == "completed"
    with Direct(flat) as disk:
        assert overlay.blocks.shown_by(disk) == overlay.blocks.model
    overlay.end(mounted)


@pytest.mark.parametrize(("file", "text"), EXCLUDED)
def test_a_shrink_while_something_begins(
    mount: Mounts, slow_host: SlowHost, tmp_path: Path, file: str, text: str
) -> None:
    overlay = Overlay(tmp_path)
    mounted = mount("-o", "allow-shrink,no-copy-on-read", f"d={overlay.path}", prefix=slow_host.prefix)
    flat = mounted.flat("d")
    with Direct(flat) as disk:
        overlay.blocks.write(disk, 8 * MIB, 2)
    # its journal, or the new image, is about to become durable
    with slow_host.flushes.held():
        begun = told(mounted, file, text)
        slow_host.flushes.has_arrived()
        shrink = Call(os.truncate, flat, 32 * MIB)
        shrink.goes_as_far_as_it_can(mounted)
    outcome = errno_of(shrink), errno_of(begun)
    assert outcome in [(0, 0), (errno.EBUSY, 0), (0, errno.EBUSY)]
    if file != "snapshot" and not outcome[1]:
        assert mounted.job_ended("d", file)["state"] == "completed"
    assert flat.stat().st_size == (64 if outcome[0] else 32) * MIB
    with Direct(flat) as disk:
        assert overlay.blocks.shown_by(disk) == overlay.blocks.model
    overlay.end(mounted)


@pytest.mark.parametrize("how", ["truncate", "snapshot"])
def test_an_image_is_not_removed_while_it_changes(mount: Mounts, slow_host: SlowHost, tmp_path: Path, how: str) -> None:
    overlay = Overlay(tmp_path)
    mounted = mount("-o", "allow-shrink", f"d={overlay.path}", prefix=slow_host.prefix)
    with Direct(mounted.flat("d")) as disk:
        overlay.blocks.write(disk, 8 * MIB, 2)
    with slow_host.flushes.held(overlay.path):
        if how == "snapshot":
            change: Call[object] = Call(mounted.control("d", "snapshot").write_text, "create new.qcow2")
        else:
            change = Call(os.truncate, mounted.flat("d"), 32 * MIB)
        slow_host.flushes.has_arrived()
        removal = Call((mounted.point / ".cowfs" / "control").write_text, "remove d")
        removal.goes_as_far_as_it_can(mounted)
    assert (errno_of(change), errno_of(removal)) in [(0, 0), (0, errno.EBUSY)]
    mounted.umount()
    wait_for_end(mounted.process)
    changed = overlay.path if how == "truncate" else tmp_path / "new.qcow2"
    overlay.blocks.judge(changed, "qcow2")
    facts = json.loads(ok(qemu_img("info", "--output=json", changed)))
    assert facts["virtual-size"] == (32 if how == "truncate" else 64) * MIB


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_refused_images_are_refused_again_and_again(
    mount: Mounts, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    image, other = tmp_path / "a.qcow2", tmp_path / "other.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "4M"))
    link(image, other)
    mounted = mount(f"d={image}")
    for _ in range(4):
        # by processes that can be killed, if the server hangs
        assert "Device or resource busy" in shell(f"echo add y={other} >{mounted.point}/.cowfs/control").stderr
    assert "is part of the disk 'd'" in shell(f"cat {mounted.point}/.cowfs/error").stdout
    assert shell(f"cmp -n 4194304 {mounted.flat('d')} /dev/zero").returncode == 0
    end(mounted)


# -- reads and copies


def test_a_read_that_takes_long_gets_what_it_asked_for(mount: Mounts, slow_host: SlowHost, overlay_of: Overlay) -> None:
    """Meanwhile the chain becomes another, and the place is given to somebody else."""
    overlay = overlay_of
    mounted = mount("-o", "no-copy-on-read", f"d={overlay.path}", prefix=slow_host.prefix)
    with Direct(mounted.flat("d")) as disk, Direct(mounted.flat("d")) as reader:
        overlay.blocks.write(disk, 8 * MIB, 2)
        disk.sync()
        slow_host.reads.behaves(declines=1)
        with slow_host.reads.held(overlay.path, calls=1):
            from_top = Call(reader.read, 8 * MIB)
            slow_host.reads.has_arrived()
            discard = told(mounted, "discard", f"{8 * MIB} {CLUSTER}")
            discard.goes_as_far_as_it_can(mounted)
            overlay.blocks.model[8 * MIB] = 0
            for number in range(8):
                disk.sync()
                overlay.blocks.write(disk, (16 + number) * MIB, 3)
        discard.result()
        assert set(from_top.result()) in ({2}, {0})
        with slow_host.reads.held(overlay.base, calls=1):
            from_base = Call(reader.read, MIB)
            slow_host.reads.has_arrived()
            mounted.control("d", "stream").write_text("start")
            wait_for("the stream to come to its end", lambda: int(mounted.job("d", "stream")["offset"]) == 64 * MIB)
        assert set(from_base.result()) == {1}
        assert mounted.job_ended("d", "stream")["state"] == "completed"
        assert overlay.blocks.shown_by(disk) == overlay.blocks.model
    overlay.end(mounted)


@pytest.mark.parametrize(("file", "text"), [("stream", "start"), ("commit", "start"), ("commit", "start pivot=yes")])
def test_guests_win_over_a_copy_that_takes_long(
    mount: Mounts, slow_host: SlowHost, overlay_of: Overlay, file: str, text: str
) -> None:
    """The job is cancelled in the middle of a copy, and a guest writes there."""
    overlay = overlay_of
    mounted = mount("-o", "no-copy-on-read", f"d={overlay.path}", prefix=slow_host.prefix)
    with Direct(mounted.flat("d")) as disk:
        for offset in range(8 * MIB, 10 * MIB, CLUSTER):
            overlay.blocks.write(disk, offset, 2)
        disk.sync()
        # nothing is in memory, so the copy is made in threads
        slow_host.reads.behaves(declines=1)
        with slow_host.copies.held(calls=1):
            mounted.control("d", file).write_text(text)
            slow_host.copies.has_arrived()
            cancelled = told(mounted, file, "cancel")
            cancelled.goes_as_far_as_it_can(mounted)
            places = [0, MIB, 8 * MIB, 9 * MIB]
            writes = []
            for offset in places:
                guest = Direct(mounted.flat("d"))
                writes.append((guest, Call(guest.write, offset, b"\3" * CLUSTER)))
                overlay.blocks.model[offset] = 3
            for _, write in writes:
                write.goes_as_far_as_it_can(mounted)
        for guest, write in writes:
            write.result()
            guest.close()
        cancelled.result()
        assert mounted.job("d", file)["state"] == "cancelled"
        disk.sync()
        assert overlay.blocks.shown_by(disk) == overlay.blocks.model
        mounted.control("d", file).write_text(text)
        assert mounted.job_ended("d", file)["state"] == "completed"
        assert overlay.blocks.shown_by(disk) == overlay.blocks.model
    overlay.end(mounted)


# -- everything at once

#: ``COWFS_SLOW=100 scripts/test tests/mount/test_slow_mount.py`` makes many more rounds
ROUNDS = int(os.environ.get("COWFS_SLOW", "3"))
SEED = int(os.environ.get("COWFS_SEED", "1"))
#: what is done to the disk in one round
ACTS = 5


def content_of(image: Path, format: str) -> Path:
    """A sparse file with what QEMU reads of a disk."""
    flat = image.with_name("content")
    ok(qemu_img("convert", "-f", format, "-O", "raw", image, flat))
    return flat


def assert_sound(image: Path, format: str, *, killed: bool) -> None:
    """No errors; after a kill, leaks or the mark that it was not closed."""
    if format != "raw":
        checked = qemu_img("check", "-f", format, "--output=json", image)
        assert checked.stdout, checked.stderr
        found = json.loads(checked.stdout)
        assert (found["check-errors"], found.get("corruptions", 0)) == (0, 0), found
        assert killed or checked.returncode == 0, found


@contextmanager
def opened(guests: list[Guest], mounted: Mounted) -> Iterator[None]:
    """Guests that have the disk open, and find it as they left it."""
    try:
        for guest in guests:
            guest.open(mounted.flat("d"))
            guest.verify_live()
        yield
    finally:
        for guest in guests:
            guest.close()


def kill(mounted: Mounted, director: Director, guests: list[Guest], works: list[Work], chooser: random.Random) -> None:
    """Kill the server, in the middle of a job if there can be one, after some more fsyncs."""
    if len(director.layers()) > 1:
        director.begin_job()
    enough = [guest.flushes + chooser.randrange(1, 5) for guest in guests]
    wait_for("fsyncs", lambda: all(guest.flushes >= count for guest, count in zip(guests, enough, strict=True)))
    for guest in guests:
        guest.is_doomed = True
    os.kill(mounted.pid, signal.SIGKILL)
    wait_for("the guests to notice", lambda: all(work.is_over for work in works))


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_lost(mount: Mounts, slow_host: SlowHost, tmp_path: Path, format: str) -> None:
    """Every other server is killed; each time, what an fsync acknowledged is there."""
    base, top = tmp_path / "base.raw", tmp_path / f"top.{format}"
    make_base(base, SEED)
    # QEMU does not open what has tables of one cluster
    options = f"cluster_size={SMALL_CLUSTER}" + (",table_size=2" if format == "qed" else "")
    ok(qemu_img("create", "-q", "-f", format, "-o", options, "-b", base, "-F", "raw", top))
    chooser = random.Random(f"{format} {SEED}")
    director = Director(tmp_path, SEED)
    guests = [Guest(number, read_blocks(base, blocks_of(number)), SEED) for number in range(GUESTS)]
    point = mount.new_point()
    slow_host.is_slow()
    for number in range(ROUNDS):
        killed = number % 2 == 1
        where = f"allow-shrink,cache-size=1M,flush-interval=0.3,log={tmp_path}/log"
        mounted = director.mounted = mount("-o", where, f"d={top}", point=point, prefix=slow_host.prefix)
        with opened(guests, mounted):
            with at_work(*(guest.work for guest in guests)) as works:
                director.see_to_the_end()
                for _ in range(ACTS):
                    director.act()
                top, format = director.layers()[0]
                if killed:
                    kill(mounted, director, guests, works, chooser)
            if not killed:
                for guest in guests:
                    guest.verify_live()
        if not killed:
            mounted.umount()
        wait_for_end(mounted.process)
        assert_sound(top, format, killed=killed)
        content = content_of(top, format)
        for guest in guests:
            guest.verify(content, killed=killed)
    assert "Traceback" not in (tmp_path / "log").read_text()

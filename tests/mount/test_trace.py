"""Recording what is read first, and streams that follow such a trace."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, refusal
from httpservers import web_server
from mounting import Mounted, Mounts

from cowfs.block.trace import MAX_RANGES, Recording, Trace
from cowfs.errors import CowfsError, UsageError
from cowfs.jobs.journal import Entry

SIZE = 16 << 20
CLUSTER = 64 << 10


def test_what_is_written_is_read_again() -> None:
    trace = Trace(1 << 40, [(5, 7), (0, 1 << 40), ((1 << 40) - 1, 1)])
    assert Trace.parse(trace.render()) == trace
    assert Trace.parse(b"cowfs-trace: 1\n# made by hand\n\nsize: 10\n 3 4 \n") == Trace(10, [(3, 4)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "size: 5\n",
        "cowfs-trace: 2\nsize: 10\n",
        "cowfs-trace: 1\n",
        "cowfs-trace: 1\nsize: -1\n",
        "cowfs-trace: 1\nsize: 99999999999999999999\n",
        "cowfs-trace: 1\nsize: 10\n5 6\n",
        "cowfs-trace: 1\nsize: 10\n5 0\n",
        "cowfs-trace: 1\nsize: 10\n11 1\n",
        "cowfs-trace: 1\nsize: 10\n5\n",
        "cowfs-trace: 1\nsize: 10\n5 1 1\n",
        "cowfs-trace: 1\nsize: 10\n-1 1\n",
        "cowfs-trace: 1\nsize: 10\n\0\n",
        "cowfs-trace: 1\nsize: 10\n" + "0 1\n" * (MAX_RANGES + 1),
    ],
)
def test_what_is_no_trace(text: str) -> None:
    with pytest.raises(UsageError):
        Trace.parse(text.encode())


def test_a_recording_is_merged_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(10)
    for start, end in ((50, 60), (60, 80), (0, 20), (50, 70), (20, 30), (70, 90)):
        recording.note(start, end)
    assert recording.trace(85) == Trace(85, [(50, 30), (0, 30), (80, 5)])
    assert recording.bytes == 70
    monkeypatch.setattr("cowfs.block.trace.MAX_RANGES", 4)
    recording.note(200, 210)
    before = recording.is_full
    recording.note(300, 310)
    assert (before, recording.is_full) == (False, True)
    assert len(recording.ranges) == 4


def test_a_journal_keeps_the_trace() -> None:
    entry = Entry("stream", "/images/top", trace="/traces/a b")
    assert Entry.parse(entry.render()) == entry
    with pytest.raises(CowfsError):
        Entry.parse(replace(entry, verb="commit", top="/images/top", base="/images/base", pivot="no").render())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


def overlay(base: str | Path, path: Path) -> Path:
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path))
    return path


def state(mounted: Mounted, name: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in mounted.control(name, "trace").read_text().splitlines())


def read_at(path: Path, *places: int) -> None:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in places:
            os.pread(file.fileno(), 512, place)


@pytest.mark.needs("fuse")
def test_a_second_machine_gets_first_what_the_first_one_read(base: Path, tmp_path: Path, mount: Mounts) -> None:
    with web_server() as web:
        url = web.put("base.raw", base.read_bytes())
        first, second = (overlay(url, tmp_path / f"{name}.qcow2") for name in ("first", "second"))
        mounted = mount(first, second)
        trace = tmp_path / "boot.trace"
        assert state(mounted, "first")["state"] == "none"
        mounted.control("first", "trace").write_text(f"record {trace}\n")
        with pytest.raises(OSError, match="busy"):
            mounted.control("first", "trace").write_text("record other")
        places = [9 << 20, 3 << 20, 14 << 20]
        read_at(mounted.flat("first"), *places)
        assert state(mounted, "first")["state"] == "recording"
        mounted.control("first", "trace").write_text("stop")
        found = Trace.parse(trace.read_bytes())
        assert found.size == SIZE
        starts = [next(i for i, (at, size) in enumerate(found.ranges) if at <= place < at + size) for place in places]
        assert starts == sorted(starts)
        assert state(mounted, "first")["ranges"] == str(len(found.ranges))
        assert {name.name for name in tmp_path.glob("boot*")} == {"boot.trace"}
        web.seen.ranges.clear()
        mounted.control("second", "stream").write_text(f"start trace={trace}")
        assert mounted.job_ended("second", "stream")["state"] == "completed"
        asked = [start for start, _ in web.seen.ranges]
        # what the trace has comes before anything that it has not
        outside = [at for at in asked if not any(start <= at < start + size for start, size in found.ranges)]
        assert outside, "the rest came too"
        assert set(asked[: asked.index(outside[0])]) >= {start for start, _ in found.ranges if start}
        assert mounted.flat("second").read_bytes() == base.read_bytes()
        mounted.umount()
    assert qemu_img("compare", "-F", "raw", second, base).returncode == 0


@pytest.mark.needs("fuse")
def test_refusals(base: Path, tmp_path: Path, mount: Mounts) -> None:
    mounted = mount(overlay(base, tmp_path / "top.qcow2"))
    control = mounted.control("top", "trace")
    (tmp_path / "bad").write_text("rubbish")
    for file, text, number in (
        ("trace", "stop", errno.EINVAL),
        ("trace", "start", errno.EINVAL),
        ("trace", "record", errno.EINVAL),
        ("trace", f"record {base}", errno.EINVAL),
        ("trace", f"record {mounted.point}/x", errno.EPERM),
        ("trace", "record /nonexistent/x", errno.ENOENT),
        ("stream", "start trace=relative", errno.EINVAL),
        ("stream", f"start trace={tmp_path}/bad", errno.EINVAL),
        ("stream", "start trace=/dev/zero", errno.EINVAL),
        ("stream", f"start trace={base}", errno.EINVAL),
        ("stream", "start trace=/nonexistent", errno.ENOENT),
        ("stream", f"start trace={mounted.flat('top')}", errno.EPERM),
    ):
        with pytest.raises(OSError) as caught:
            mounted.control("top", file).write_text(text)
        assert caught.value.errno == number, text
        assert mounted.control("top", "error").read_text().count("\n") == 1
    mounted.control("top", "copy-on-read").write_text("off")
    with pytest.raises(OSError, match="Invalid argument"):
        control.write_text(f"record {tmp_path}/trace")
    assert not (tmp_path / "trace").exists()
    mounted.umount()


@pytest.mark.needs("fuse")
def test_the_end_of_the_mount_writes_the_trace_which_serves_offline_too(
    base: Path, tmp_path: Path, mount: Mounts
) -> None:
    mounted = mount(overlay(base, tmp_path / "top.qcow2"))
    # as long as a name may be: while it is being replaced, it has another one
    trace = tmp_path / f"with space{'ä' * 122}"
    mounted.control("top", "trace").write_text(f"record {trace.name}")
    read_at(mounted.flat("top"), 5 << 20)
    mounted.umount()
    assert Trace.parse(trace.read_bytes()).ranges
    other = overlay(base, tmp_path / "other.qcow2")
    assert "is no trace" in refusal(cowfs("stream", "--trace", other, other))
    ok(cowfs("stream", "-q", "--trace", trace, other))
    assert "backing file" not in ok(cowfs("info", other))
    assert qemu_img("compare", "-F", "raw", other, base).returncode == 0

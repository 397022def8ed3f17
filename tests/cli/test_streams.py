"""Standard streams that are closed or full: work that is done is done, and facts that cannot be told are missed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Result, cowfs, ok, qemu_img, qemu_io
from mounting import Mounts

MIB = 1 << 20
FULL = "cowfs: standard output: No space left on device\n"
CLOSED = "cowfs: standard output: Bad file descriptor\n"
STREAMS = [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"]


def run(redirected: str, *words: str | Path, cwd: Path | None = None) -> Result:
    """Run ``cowfs`` with its standard streams as a shell redirects them."""
    script = f'exec "$@" {redirected}'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "cowfs", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    base, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(os.urandom(2 * MIB))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path))
    qemu_io(path, "qcow2", "write -P 3 64k 64k")
    return path


def content(path: Path) -> bytes:
    """What QEMU reads of an image that is sound."""
    ok(qemu_img("check", "-q", path))
    flat = path.with_name("flat")
    ok(qemu_img("convert", "-O", "raw", path, flat))
    return flat.read_bytes()


#: work, as words with {} for the image, of which only something is mentioned
WORK = [
    ("create", "-f", "qcow2", "{}.new", "1M"),
    ("resize", "{}", "+1M"),
    ("convert", "-p", "-O", "qcow2", "{}", "{}.new"),
    ("commit", "-p", "{}"),
    ("stream", "{}"),
    ("rebase", "-p", "-b", "", "{}"),
    ("snapshot", "-c", "name", "{}"),
]


@pytest.mark.parametrize("redirected", STREAMS)
@pytest.mark.parametrize("words", WORK, ids=lambda words: words[0])
def test_work_is_done_whoever_listens(overlay: Path, words: tuple[str, ...], redirected: str) -> None:
    before = content(overlay)
    result = run(redirected, *(word.format(overlay) for word in words))
    assert (result.returncode, result.stderr) == (0, "")
    assert content(overlay)[: 2 * MIB] == before
    if words[0] == "convert":
        assert content(Path(f"{overlay}.new")) == before
    elif words[0] == "create":
        ok(qemu_img("check", f"{overlay}.new"))
    elif words[0] in ("stream", "rebase"):
        assert "backing file" not in ok(qemu_img("info", overlay))
    elif words[0] == "commit":
        assert (overlay.parent / "base.raw").read_bytes() == before


#: questions, whose answers are all that there is
QUESTIONS = [
    ("--help",),
    ("--version",),
    ("create", "--help"),
    ("create", "-f", "qcow2", "-o", "help"),
    ("info", "{}"),
    ("info", "--json", "{}"),
    ("map", "{}"),
    ("check", "{}"),
    ("check", "--json", "{}"),
    ("compare", "{}", "{}"),
    ("measure", "-O", "qcow2", "{}"),
    ("verify", "{}"),
    ("snapshot", "{}"),
    ("status", "--json"),
]


@pytest.mark.parametrize(("redirected", "sentence"), [(">/dev/full", FULL), (">&-", CLOSED)])
@pytest.mark.parametrize("words", QUESTIONS, ids=" ".join)
def test_answers_that_cannot_be_given_are_missed(
    overlay: Path, words: tuple[str, ...], redirected: str, sentence: str
) -> None:
    if words[0] == "snapshot":
        ok(cowfs("snapshot", "-c", "name", overlay))
    result = run(redirected, *(word.format(overlay) for word in words))
    assert result.returncode == (2 if words[0] in ("compare", "verify") else 1)
    assert result.stderr == sentence
    # and there is nobody to tell why
    assert run(f"{redirected} 2>&-", *(word.format(overlay) for word in words)).returncode == result.returncode


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
def test_a_refusal_that_nobody_hears_is_one(overlay: Path, redirected: str) -> None:
    result = run(redirected, "info", f"{overlay}.missing")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")
    assert run(redirected, "info", "--rubbish").returncode == 2


def test_progress_goes_on_into_a_pipe_that_nobody_reads(overlay: Path) -> None:
    before = content(overlay)
    script = '("$@"; echo $? >&2) | true'
    command = [
        "bash",
        "-c",
        script,
        "sh",
        sys.executable,
        "-m",
        "cowfs",
        "convert",
        "-p",
        str(overlay),
        f"{overlay}.new",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == "0\n"
    assert Path(f"{overlay}.new").read_bytes() == before


@pytest.mark.needs("fuse")
@pytest.mark.parametrize("redirected", STREAMS)
def test_a_mount_takes_no_file_for_a_standard_stream(mount: Mounts, overlay: Path, redirected: str) -> None:
    """With descriptor 0 free, the image would be it; and going to the background puts something else in its place."""
    before = content(overlay)
    point = mount.new_point()
    assert run(redirected, "mount", overlay, point).returncode == 0
    server = json.loads((point / ".cowfs" / "status.json").read_text())["pid"]
    assert [str(Path(f"/proc/{server}/fd/{number}").readlink()) for number in range(3)] == [os.devnull] * 3
    with (point / "top").open("r+b") as file:
        file.write(b"written")
        os.fsync(file.fileno())
    for words in (("stream", point / "top"), ("umount", point)):
        assert run(redirected, *words).returncode == 0
    assert content(overlay) == b"written" + before[7:]

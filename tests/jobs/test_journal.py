"""The file from which a job is started again: what it holds, that it is whole or refused, and how it is replaced."""

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from cowfs.errors import CowfsError
from cowfs.jobs.journal import MAX_BYTES, NEW_SUFFIX, SUFFIX, Entry, Merged, read_journal, remove_journal, write_journal

FILE = "/images/top.qcow2"
STREAM = Entry("stream", FILE)
COMMIT = Entry("commit", FILE, top=FILE, base="/images/base.raw", pivot="no")
MIDDLE = Entry(
    "commit",
    FILE,
    speed=1 << 20,
    on_error="stop",
    paused=True,
    base="/images/base.raw",
    top="/images/b.qed",
    pivot="no",
    above="/images/c.qcow2",
    merged=(Merged("qed", "/images/b.qed"), Merged("qcow2", "/images/a.qcow2")),
)
PIVOT = replace(COMMIT, pivot="wait", merged=(Merged("qcow2", FILE),))
DEEP = replace(COMMIT, merged=(Merged("qcow2", "/images/b"), Merged("qcow2", "/images/a")))
ODD = os.fsdecode(b"/a\nverb: commit\ncheck: 0 %41\xff\xfe\x00".replace(b"\0", b"")) + " é=\r\x85\u2028"
ENTRIES = [
    STREAM,
    replace(STREAM, base="/images/a", speed=(1 << 63) - 1, on_error="ignore", paused=True),
    COMMIT,
    MIDDLE,
    PIVOT,
    DEEP,
    Entry("stream", ODD, base=f"{ODD}2"),
    Entry("commit", ODD, base=ODD, top=f"{ODD}2", pivot="yes", above=ODD, merged=(Merged("qcow2", ODD),) * 3),
    replace(DEEP, pivot="yes", merged=(Merged("qcow2", FILE), *DEEP.merged)),
]


def sealed(body: str) -> bytes:
    """A body with the check that it should have."""
    data = body.encode()
    return data + f"check: {xxhash.xxh3_64_intdigest(data):016x}\n".encode()


def body_of(entry: Entry) -> str:
    return entry.render().decode().partition("check: ")[0]


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_written_is_read(entry: Entry) -> None:
    data = entry.render()
    assert data.isascii()
    assert Entry.parse(data) == entry


def test_it_is_text() -> None:
    assert body_of(replace(MIDDLE, above="/images/c d\n.qcow2")) == (
        "cowfs-job: 1\n"
        "verb: commit\n"
        "file: /images/top.qcow2\n"
        "speed: 1048576\n"
        "on-error: stop\n"
        "paused: yes\n"
        "base: /images/base.raw\n"
        "top: /images/b.qed\n"
        "above: /images/c%20d%0A.qcow2\n"
        "pivot: no\n"
        "merged: qed /images/b.qed\n"
        "merged: qcow2 /images/a.qcow2\n"
    )
    assert sealed(body_of(MIDDLE)) == MIDDLE.render()


@pytest.mark.parametrize("entry", [STREAM, MIDDLE])
def test_damage_of_every_byte_is_seen(entry: Entry) -> None:
    data = entry.render()
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            refused(bytes(changed))
        refused(data[:position])
        refused(data[:position] + data[position + 1 :])
        refused(data[:position] + bytes(512))
        refused(data[:position] + b"\n" + data[position:])
    refused(data + b"\n")
    refused(data + data)


def refused(data: bytes) -> None:
    with pytest.raises(CowfsError, match=r"^is damaged$"):
        Entry.parse(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("verb: commit", "verb: mirror"),
        ("verb: commit", "verb: stream"),
        ("verb: commit\n", ""),
        ("file: /images/top.qcow2\n", ""),
        ("speed: 1048576", "speed: 01048576"),
        ("speed: 1048576", "speed: -1"),
        ("speed: 1048576", "speed: fast"),
        ("speed: 1048576", f"speed: {1 << 63}"),
        ("speed: 1048576", f"speed: {'9' * 5000}"),
        ("on-error: stop", "on-error: cry"),
        ("paused: yes", "paused: maybe"),
        ("paused: yes", "paused: yes\npaused: yes"),
        ("paused: yes", "paused: yes\nmood: good"),
        ("base: /images/base.raw\n", ""),
        ("top: /images/b.qed\n", ""),
        ("top: /images/b.qed", "top: /images/b%2eqed"),
        ("above: /images/c.qcow2\n", ""),
        ("top: /images/b.qed", f"top: {FILE}"),
        ("pivot: no\n", ""),
        ("pivot: no", "pivot: perhaps"),
        ("merged: qed /images/b.qed", "merged: qed"),
        ("\n", "\n\n"),
        ("\n", "\r\n"),
    ],
)
def test_a_right_check_over_nonsense_is_refused(old: str, new: str) -> None:
    body = body_of(MIDDLE)
    assert old in body
    with pytest.raises(CowfsError, match=r"^(makes no sense|is of a version)"):
        Entry.parse(sealed(body.replace(old, new)))


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(CowfsError, match=r"^is of a version that this program does not know$"):
        Entry.parse(sealed(body_of(STREAM).replace("job: 1", "job: 2")))
    with pytest.raises(CowfsError, match=r"^is of a version"):
        Entry.parse(sealed("\n"))
    refused(sealed(""))


# -- the file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    return path


@pytest.fixture
def at(image: Path) -> str:
    """Where the journal of the image is."""
    return f"{image}{SUFFIX}"


def entry_for(image: Path, **fields: Any) -> Entry:
    return Entry("stream", str(image), **fields)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_written_read_replaced_removed(image: Path, at: str) -> None:
    assert read_journal(at) is None
    for speed in (0, 7):
        write_journal(at, entry_for(image, speed=speed))
        assert read_journal(at) == entry_for(image, speed=speed)
        assert names_in(image.parent) == ["image", f"image{SUFFIX}"]
        assert Path(at).stat().st_mode & 0o777 == 0o600
    remove_journal(at)
    assert names_in(image.parent) == ["image"]
    remove_journal(at)
    assert read_journal(at) is None
    assert read_journal(f"{image}{'x' * 300}") is None


def _sound() -> str:
    """The name of a journal that is sound."""
    Path("sound").write_bytes(STREAM.render())
    assert read_journal("sound") == STREAM
    return "sound"


def _make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkdir, "is no regular file"),
        (os.mkfifo, "is no regular file"),
        (lambda path: Path(path).symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: Path(path).symlink_to(_sound()), "is no regular file"),
        (_make_socket, "is no regular file"),
        (lambda path: Path(path).write_bytes(bytes(MAX_BYTES + 1)), "has more than 65536 bytes"),
        (lambda path: Path(path).touch(), "is damaged"),
        (lambda path: Path(path).write_bytes(bytes(MAX_BYTES)), "is damaged"),
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[str], object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make("x")
    with pytest.raises(CowfsError, match=f"^x: {sentence}$"):
        read_journal("x")
    assert os.path.lexists("x")


@pytest.mark.needs("root")
def test_a_journal_of_another_user_is_refused(image: Path, at: str) -> None:
    write_journal(at, entry_for(image))
    os.chown(at, 1234, 0)
    with pytest.raises(CowfsError, match=r"belongs to another user \(1234\)$"):
        read_journal(at)


def test_what_is_too_long_or_has_no_place_is_not_written(image: Path, at: str, tmp_path: Path) -> None:
    with pytest.raises(CowfsError, match=r"would have more than 65536 bytes$"):
        write_journal(at, entry_for(image, base="x" * MAX_BYTES))
    with pytest.raises(CowfsError, match="File name too long"):
        write_journal(f"{tmp_path}/{'x' * 250}{SUFFIX}", entry_for(image))
    device = Entry("stream", "/dev/null")
    with pytest.raises(CowfsError, match=r"^/dev/null: is no regular file"):
        write_journal(at, device)
    assert names_in(tmp_path) == ["image"]


def test_what_lies_in_the_way_of_the_new_one_is_not_followed(image: Path, at: str) -> None:
    precious = image.with_name("precious")
    precious.write_bytes(b"precious")
    new = Path(f"{image}{NEW_SUFFIX}")
    new.symlink_to(precious)
    write_journal(at, entry_for(image))
    assert read_journal(at) == entry_for(image)
    assert precious.read_bytes() == b"precious"
    assert not os.path.lexists(new)


class _Cut(BaseException):
    """The power goes."""


#: every call of the operating system that writing makes, in order
STEPS = ["os.stat", "os.unlink", "os.open", "os.fstat", "os.fsync", "os.replace", "os.open", "os.fsync"]


def record_steps(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[int], None]) -> list[str]:
    """Note each step, and ask ``trouble`` with its number before it is made."""
    done: list[str] = []
    for name in sorted({step.removeprefix("os.") for step in STEPS}):
        real = getattr(os, name)

        def call(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            done.append(f"os.{name}")
            trouble(len(done) - 1)
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)
    return done


def test_the_steps_of_writing(image: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        done = record_steps(patch, lambda number: None)
        write_journal(at, entry_for(image))
    assert done == STEPS


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_step_that_fails_leaves_the_old_one(
    image: Path, at: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_journal(at, entry_for(image, speed=1))

    def trouble(step: int) -> None:
        if step == number:
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        record_steps(patch, trouble)
        with pytest.raises(CowfsError, match="No space left on device") as caught:
            write_journal(at, entry_for(image, speed=2))
    assert caught.value.errno == errno.ENOSPC
    # once it is in place only its durability is in doubt
    in_place = number > STEPS.index("os.replace")
    assert read_journal(at) == entry_for(image, speed=2 if in_place else 1)
    assert names_in(image.parent) == ["image", f"image{SUFFIX}"]


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_crash_leaves_the_old_one_or_the_new_one(
    image: Path, at: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_journal(at, entry_for(image, speed=1))

    def trouble(step: int) -> None:
        # nothing is cleaned up after a crash
        if step >= number:
            raise _Cut

    with monkeypatch.context() as patch:
        record_steps(patch, trouble)
        with pytest.raises(_Cut):
            write_journal(at, entry_for(image, speed=2))
    assert read_journal(at) == entry_for(image, speed=2 if number > STEPS.index("os.replace") else 1)
    write_journal(at, entry_for(image, speed=3))
    assert read_journal(at) == entry_for(image, speed=3)
    assert names_in(image.parent) == ["image", f"image{SUFFIX}"]


def test_a_journal_that_would_belong_to_another_user_is_not_written(
    image: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4321)
        with pytest.raises(CowfsError, match=r"would belong to another user$"):
            write_journal(at, entry_for(image))
    assert names_in(image.parent) == ["image"]


# -- the chain


@pytest.mark.parametrize(
    ("entry", "names", "fits", "relinked"),
    [
        (STREAM, [FILE], True, False),
        (STREAM, [FILE, "/images/a"], True, False),
        (STREAM, ["/other", FILE], False, False),
        (replace(STREAM, base="/a"), [FILE, "/b", "/a", "/c"], True, False),
        (replace(STREAM, base="/a"), [FILE, "/a", "/c"], True, False),
        (replace(STREAM, base="/a"), [FILE, "/c"], False, False),
        (replace(STREAM, base=FILE), [FILE, "/c"], False, False),
        (COMMIT, [FILE, "/images/base.raw"], True, False),
        (COMMIT, [FILE, "/images/base.raw", "/x"], True, False),
        (COMMIT, [FILE], False, False),
        (COMMIT, [FILE, "/x", "/images/base.raw"], False, False),
        (COMMIT, ["/copy", "/images/base.raw"], False, False),
        (PIVOT, [FILE, "/images/base.raw"], True, False),
        (PIVOT, ["/images/base.raw"], False, False),
        (DEEP, [FILE, "/images/b", "/images/a", "/images/base.raw"], True, False),
        (DEEP, [FILE, "/images/base.raw"], False, True),
        (DEEP, [FILE, "/images/a", "/images/base.raw"], False, False),
        (ENTRIES[-1], [FILE, "/images/b", "/images/a", "/images/base.raw"], True, False),
        (ENTRIES[-1], [FILE, "/images/base.raw"], False, True),
        (ENTRIES[-1], ["/images/base.raw"], False, False),
        (MIDDLE, [FILE, "/images/c.qcow2", "/images/b.qed", "/images/a.qcow2", "/images/base.raw"], True, False),
        (MIDDLE, [FILE, "/y", "/images/c.qcow2", "/images/b.qed", "/images/a.qcow2", "/images/base.raw"], True, False),
        (MIDDLE, [FILE, "/images/c.qcow2", "/images/base.raw"], False, True),
        (MIDDLE, [FILE, "/images/c.qcow2", "/images/base.raw", "/x"], False, True),
        (MIDDLE, [FILE, "/images/c.qcow2", "/images/base.raw", "/images/b.qed"], False, False),
        (MIDDLE, [FILE, "/images/c.qcow2", "/x", "/images/base.raw"], False, False),
        (MIDDLE, [FILE, "/images/base.raw"], False, False),
        (MIDDLE, ["/images/c.qcow2", "/images/base.raw"], False, False),
        (MIDDLE, [FILE, "/images/b.qed", "/images/a.qcow2", "/images/base.raw"], False, False),
    ],
)
def test_which_chain_is_still_the_one(entry: Entry, names: list[str], fits: bool, relinked: bool) -> None:
    assert (entry.fits(names), entry.is_relinked(names)) == (fits, relinked)

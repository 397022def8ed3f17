"""``cowfs snapshot`` and the snapshots in ``cowfs info``, against ``qemu-img`` on the same image."""

import json
import random
import re
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from imagetools import assert_clean, qemu_content
from mounting import Mounts

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE)))
    qemu_io(path, "qcow2", "write -P 1 0 1M")
    return path


def without_dates(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)


def test_there_and_back_again(image: Path) -> None:
    first = qemu_content(image)
    assert ok(cowfs("snapshot", "-c", "first", image)) == ""
    qemu_io(image, "qcow2", "write -P 2 0 2M")
    second = qemu_content(image)
    assert ok(cowfs("snapshot", "--create", "second", image)) == ""
    assert ok(cowfs("snapshot", "-a", "first", image)) == ""
    assert qemu_content(image) == first
    assert ok(cowfs("snapshot", "--apply", "2", image)) == ""
    assert qemu_content(image) == second
    assert ok(cowfs("snapshot", "-q", "-f", "qcow2", "-d", "first", image)) == ""
    assert [line.split()[1] for line in ok(cowfs("snapshot", "-l", image)).splitlines()[2:]] == ["second"]
    assert ok(cowfs("snapshot", "--delete", "second", image)) == ""
    assert ok(cowfs("snapshot", image)) == ""
    assert_clean(image)


def test_lists_are_those_of_qemu_img(image: Path) -> None:
    for name in ("one", "a name that is longer than its column", "2"):
        ok(qemu_img("snapshot", "-c", name, image))
    assert ok(cowfs("snapshot", "-l", image)) == ok(qemu_img("snapshot", "-l", image))
    ok(cowfs("snapshot", "-c", "mine", image))
    ok(qemu_img("snapshot", "-d", "one", image))
    assert ok(cowfs("snapshot", "--list", image)) == ok(qemu_img("snapshot", "-l", image))
    assert ok(cowfs("snapshot", image)) == ok(cowfs("snapshot", "-l", image))


def test_times_and_sizes_of_a_machine(image: Path) -> None:
    """A snapshot as a running machine leaves it, put together by hand."""
    ok(cowfs("snapshot", "-c", "vm", image))
    data = bytearray(image.read_bytes())
    entry = int.from_bytes(data[64:72], "big")
    data[entry + 24 : entry + 32] = (3_723_456_000_000 * 30).to_bytes(8, "big")
    data[entry + 40 : entry + 48] = (300 << 20).to_bytes(8, "big")
    data[entry + 56 : entry + 64] = (123_456).to_bytes(8, "big")
    image.write_bytes(data)
    assert ok(cowfs("snapshot", "-l", image)) == ok(qemu_img("snapshot", "-l", image))
    mine, theirs = (json.loads(ok(run("info", "--output=json", image))) for run in (cowfs, qemu_img))
    assert mine["snapshots"] == theirs["snapshots"]


def test_info_shows_them(image: Path) -> None:
    assert "snapshots" not in json.loads(ok(cowfs("info", "--json", image)))
    ok(cowfs("snapshot", "-c", "one", image))
    ok(qemu_img("snapshot", "-c", "two", image))
    mine, theirs = (json.loads(ok(run("info", "--output=json", image))) for run in (cowfs, qemu_img))
    assert mine["snapshots"] == theirs["snapshots"]
    assert next(iter(mine)) == "snapshots"
    mine, theirs = (ok(run("info", image)).splitlines() for run in (cowfs, qemu_img))
    assert mine == theirs


def test_the_date_is_now(image: Path) -> None:
    ok(cowfs("snapshot", "-c", "mine", image))
    ok(qemu_img("snapshot", "-c", "theirs", image))
    mine, theirs = json.loads(ok(qemu_img("info", "--output=json", image)))["snapshots"]
    assert 0 <= theirs["date-sec"] - mine["date-sec"] < 60
    assert 0 < mine["date-nsec"] < 1_000_000_000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("-a", "none"), "there is no snapshot 'none'"),
        (("-d", "none"), "there is no snapshot 'none'"),
        (("-d", "1"), "there is no snapshot '1'"),
        (("-c", "n" * 256), "the name of a snapshot has at most 255 bytes"),
    ],
)
def test_refusals_change_nothing(image: Path, words: tuple[str, str], sentence: str) -> None:
    ok(cowfs("snapshot", "-c", "one", image))
    before = image.read_bytes()
    assert refusal(cowfs("snapshot", *words, image)) == f"{image}: {sentence}"
    assert image.read_bytes() == before


def test_actions_exclude_each_other(image: Path) -> None:
    sentence = "cannot mix '-l', '-a', '-c', '-d'; see 'cowfs snapshot --help'"
    assert refusal(cowfs("snapshot", "-l", "-c", "x", image), 2) == sentence
    assert refusal(cowfs("snapshot", "-a", "y", "-d", "x", image), 2) == sentence


@pytest.mark.parametrize("format", ["raw", "qed"])
def test_other_formats(tmp_path: Path, format: str) -> None:
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", format, path, "1M"))
    assert ok(cowfs("snapshot", "-l", "-f", format, path)) == ""
    said = refusal(cowfs("snapshot", "-f", format, "-c", "x", path))
    assert said == f"{path}: {format} images have no internal snapshots"


def test_counts_of_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "1M"))
    said = refusal(cowfs("snapshot", "-c", "x", path))
    assert said == f"{path}: reference counts of 1 bit cannot count what snapshots share"


@pytest.mark.needs("fuse")
class TestMounts:
    def test_a_snapshot_is_mounted(self, image: Path, mount: Mounts) -> None:
        before = qemu_content(image)
        ok(cowfs("snapshot", "-c", "before", image))
        qemu_io(image, "qcow2", "write -P 9 0 3M")
        mounted = mount("-o", "snapshot=before", image)
        flat = mounted.flat("image")
        assert flat.read_bytes() == before
        with pytest.raises(OSError, match="Read-only file system"):
            flat.open("r+b")
        mounted.umount()
        mounted = mount("-o", "snapshot=1", image)
        assert mounted.flat("image").read_bytes() == before
        mounted.umount()

    def test_one_that_is_not_there(self, image: Path, mount: Mounts) -> None:
        said = refusal(cowfs("mount", "-o", "snapshot=none", image, mount.new_point()))
        assert said == f"{image}: there is no snapshot 'none'"

    def test_images_in_use_are_left_alone(self, image: Path, mount: Mounts) -> None:
        mounted = mount(image)
        flat = mounted.flat("image")
        for words in (["-l"], ["-a", "x"], ["-d", "x"]):
            said = refusal(cowfs("snapshot", *words, flat))
            assert said.startswith(f"{flat}: is in use by a mount, where 'snapshot -c FILE' puts a new overlay on top")
        with flat.open("r+b") as file:
            file.write(random.Random(1).randbytes(SIZE))
        mounted.umount()
        assert_clean(image)

"""``stream --base`` and ``commit --top --base --pivot``: layers by number and by file."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounts, wait_for

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img", "qemu-io")]

MIB = 1 << 20
SIZE = 8 * MIB
#: active layer first; the numbers of these are 3, 2, 1, 0
NAMES = ["vm.qcow2", "upper.qcow2", "lower.qcow2", "base.raw"]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Four layers with something in each; the backing files are recorded by their mere names."""
    (tmp_path / "base.raw").write_bytes(os.urandom(SIZE))
    for number, (name, below) in enumerate(zip(NAMES[2::-1], NAMES[:0:-1], strict=True), start=1):
        format = below.partition(".")[2]
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", format, tmp_path / name, cwd=tmp_path))
        qemu_io(tmp_path / name, "qcow2", f"write -P {number} {number}M 1536k")
    return tmp_path / NAMES[0]


def content(image: Path) -> bytes:
    """What QEMU says the disk of an image holds."""
    out = image.with_name("content")
    ok(qemu_img("convert", "-O", "raw", image, out))
    return out.read_bytes()


def files(path: Path) -> list[str]:
    """Names of the files of a chain, by its control file."""
    return [Path(line.split(maxsplit=3)[-1]).name for line in path.read_text().splitlines()]


def qemu_files(image: Path) -> list[str]:
    """Names of the files of a chain, as QEMU finds them."""
    lines = ok(qemu_img("info", "-U", "--backing-chain", image)).splitlines()
    return [Path(line.removeprefix("image: ")).name for line in lines if line.startswith("image: ")]


def sound(*images: Path) -> None:
    for image in images:
        ok(qemu_img("check", "-q", image))


@pytest.mark.parametrize(("base", "left"), [("base.raw", 1), ("lower.qcow2", 2), ("./upper.qcow2", 3)])
def test_an_image_file_is_streamed_down_to_a_base(chain: Path, base: str, left: int) -> None:
    before = content(chain)
    below = {name: chain.with_name(name).read_bytes() for name in NAMES[1:]}
    assert "stream: completed" in ok(cowfs("stream", "--base", base, chain))
    assert content(chain) == before
    assert qemu_files(chain) == [NAMES[0], *NAMES[-left:]]
    assert {name: chain.with_name(name).read_bytes() for name in NAMES[1:]} == below
    sound(chain)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stream", "--base", "other.qcow2"], "there is no backing file 'other.qcow2' in its chain"),
        (["stream", "--base", "vm.qcow2"], "there is no backing file 'vm.qcow2' in its chain"),
        (["stream", "--base", "0"], "there is no backing file '0' in its chain"),
        (["commit", "--top", "1"], "--top is for disks of a mount"),
        (["commit", "--pivot"], "--pivot is for disks of a mount"),
    ],
)
def test_what_makes_no_sense_for_an_image_file(chain: Path, words: list[str], says: str) -> None:
    before = chain.read_bytes()
    assert says in refusal(cowfs(*words, chain, cwd=chain.parent))
    assert chain.read_bytes() == before


@pytest.mark.parametrize(("base", "left"), [("0", 1), ("lower.qcow2", 2), ("2", 3)])
def test_a_mounted_disk_is_streamed_down_to_a_base(mount: Mounts, chain: Path, base: str, left: int) -> None:
    before = content(chain)
    mounted = mount(chain)
    assert "stream: completed" in ok(cowfs("stream", "--base", base, mounted.flat("vm")))
    assert files(mounted.control("vm", "chain")) == [NAMES[0], *NAMES[-left:]]
    assert mounted.flat("vm").read_bytes() == before
    mounted.umount()
    assert content(chain) == before
    assert qemu_files(chain) == [NAMES[0], *NAMES[-left:]]
    sound(chain)


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], [0, 1, 2, 3]),
        (["--base", "0"], [0, 3]),
        (["-b", "base.raw"], [0, 3]),
        (["--top", "2"], [0, 2, 3]),
        (["--top", "upper.qcow2", "--base", "{here}/base.raw"], [0, 3]),
        (["--top", "1", "--base", "0"], [0, 1, 3]),
        (["--pivot"], [1, 2, 3]),
        (["--pivot=no"], [0, 1, 2, 3]),
        (["--pivot=yes", "--base", "1"], [2, 3]),
    ],
)
def test_layers_of_a_mounted_disk_are_committed(
    mount: Mounts, chain: Path, words: Sequence[str], left: Sequence[int]
) -> None:
    before = content(chain)
    mounted = mount(chain)
    given = [word.format(here=chain.parent) for word in words]
    # an option's value is not the disk
    assert "commit: completed" in ok(cowfs("commit", *given, mounted.flat("vm"), cwd=chain.parent))
    names = [NAMES[depth] for depth in left]
    assert files(mounted.control("vm", "chain")) == names
    assert mounted.flat("vm").read_bytes() == before
    mounted.umount()
    top = chain.with_name(names[0])
    assert content(top) == before
    assert qemu_files(top) == names
    sound(top)


def test_a_pivot_that_waits_is_completed_by_command(mount: Mounts, chain: Path) -> None:
    before = bytearray(content(chain))
    mounted = mount(chain)
    flat = mounted.flat("vm")
    said = ok(cowfs("commit", "--pivot=wait", "--base", "0", flat))
    assert "commit: ready" in said
    assert f"have it finish with 'cowfs job {flat} complete'" in said
    assert ok(cowfs("job", flat)).startswith("job: commit\nstate: ready\n")
    assert "is ready" in ok(cowfs("job", flat, "wait"))
    with open(flat, "r+b") as file:
        file.write(b"x" * MIB)
    before[:MIB] = b"x" * MIB
    assert flat.read_bytes() == before
    assert "commit: completed" in ok(cowfs("job", flat, "complete"))
    assert files(mounted.control("vm", "chain")) == ["base.raw"]
    assert flat.read_bytes() == before
    mounted.umount()
    assert chain.with_name("base.raw").read_bytes() == before


def test_a_pivot_that_waits_may_be_cancelled(mount: Mounts, chain: Path) -> None:
    before = content(chain)
    mounted = mount(chain)
    flat = mounted.flat("vm")
    assert ok(cowfs("commit", "-q", "--pivot=wait", flat)) == ""
    assert ok(cowfs("job", flat, "cancel")) == ""
    assert files(mounted.control("vm", "chain")) == NAMES
    assert flat.read_bytes() == before
    mounted.umount()
    assert content(chain) == before
    sound(chain)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stream", "--base", "9"], "there is no layer 9; the chain has 0, the deepest, to 3"),
        (["stream", "--base", "99999999999999999999"], "there is no layer 9999"),
        (["stream", "--base", "other.qcow2"], "there is no layer 'other.qcow2' in its chain"),
        (["stream", "--base", "3"], "below"),
        (["commit", "--base", "3"], "below"),
        (["commit", "--top", "0"], "there is no layer below it"),
        (["commit", "--top", "1", "--base", "2"], "does not lie below"),
        (["commit", "--top", "1", "--pivot"], "is for commits of the active layer"),
        (["commit", "--keep"], "--keep is for image files"),
    ],
)
def test_what_makes_no_sense_for_a_mounted_disk(mount: Mounts, chain: Path, words: list[str], says: str) -> None:
    mounted = mount(chain)
    assert says in refusal(cowfs(*words, mounted.flat("vm"), cwd=chain.parent))
    assert files(mounted.control("vm", "chain")) == NAMES
    wait_for("the end of what never began", lambda: mounted.job("vm", words[0])["state"] in ("none", "failed"))


def test_a_pivot_takes_no_word_behind_it(mount: Mounts, chain: Path) -> None:
    mounted = mount(chain)
    assert "unexpected extra argument" in refusal(cowfs("commit", "--pivot", "yes", mounted.flat("vm")), 2)
    assert "is not one of" in refusal(cowfs("commit", "--pivot=perhaps", mounted.flat("vm")), 2)

"""``check -r``: what it says and returns is what ``qemu-img check -r`` does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from qcow2damage import COPIED, MASK, Anatomy

Damage = Callable[[Anatomy], None]


def _leak(image: Anatomy) -> None:
    """Two clusters that nothing refers to."""
    for place in image.l2_places()[:2]:
        image.put(place, 0)


def _high(image: Anatomy) -> None:
    """Counts that are too high, which makes the copied flags wrong."""
    _set_counts(image, 3)


def _low(image: Anatomy) -> None:
    _set_counts(image, 0)


def _set_counts(image: Anatomy, count: int) -> None:
    block = image.get(image.blocks()[0]) & MASK
    for place in image.l2_places()[4:7]:
        image.put(block + 2 * ((image.get(place) & MASK) >> image.bits), count, 2)


def _flags(image: Anatomy) -> None:
    for place in image.l2_places()[:3]:
        image.put(place, image.get(place) & ~COPIED)


def _nothing(image: Anatomy) -> None:
    """No damage."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "4M"))
    qemu_io(path, "qcow2", "write -P 1 0 1M")
    return path


@pytest.mark.parametrize("what", ["leaks", "all"])
@pytest.mark.parametrize("damage", [_leak, _high, _flags, _nothing])
def test_a_repair_says_what_qemu_img_says(image: Path, damage: Damage, what: str) -> None:
    anatomy = Anatomy(image)
    damage(anatomy)
    for option in ("--output=human", "--output=json"):
        anatomy.write(image)
        theirs = qemu_img("check", "-r", what, option, image)
        anatomy.write(image)
        ours = cowfs("check", "-r", what, option, image)
        assert (ours.returncode, bool(ours.stderr)) == (theirs.returncode, bool(theirs.stderr))
        if option == "--output=json":
            assert json.loads(ours.stdout) == json.loads(theirs.stdout)
        else:
            assert ours.stdout == theirs.stdout
    if what == "all" or damage is not _flags:
        assert cowfs("check", image).returncode == qemu_img("check", image).returncode == 0


def test_counts_that_are_too_low_are_raised_with_all_only(image: Path) -> None:
    anatomy = Anatomy(image)
    _low(anatomy)
    anatomy.write(image)
    assert cowfs("check", image).returncode == cowfs("check", "-r", "leaks", image).returncode == 2
    assert anatomy.data == image.read_bytes()
    result = cowfs("check", "-r", "all", image)
    assert result.returncode == 0
    assert (
        "    0 leaked clusters\n    3 corruptions\n\nDouble checking the fixed image now...\nNo errors" in result.stdout
    )
    assert result.stderr.count("Repairing cluster ") == 3
    assert qemu_img("check", image).returncode == 0


def test_a_repair_can_be_quiet(image: Path) -> None:
    anatomy = Anatomy(image)
    _low(anatomy)
    anatomy.write(image)
    assert ok(cowfs("check", "-q", "-r", "all", image)) == ""
    assert qemu_img("check", image).returncode == 0


def test_images_that_cannot_be_opened_otherwise_are_opened_for_a_repair(image: Path) -> None:
    anatomy = Anatomy(image)
    anatomy.put(48, 1 << 40)
    anatomy.write(image)
    assert "beyond the end of the file" in refusal(cowfs("check", image))
    assert cowfs("check", "-r", "all", image).returncode == 0
    assert qemu_img("check", image).returncode == 0


def test_what_cannot_be_repaired_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(512))
    assert "nothing that could be checked" in refusal(cowfs("check", "-r", "all", tmp_path / "raw"), 63)
    assert "unknown format" in refusal(cowfs("check", "-f", "x", "-r", "all", tmp_path / "raw"))
    assert "'some'" in refusal(cowfs("check", "-r", "some", tmp_path / "raw"))


def test_leaks_of_qed_images_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    ok(qemu_img("create", "-q", "-f", "qed", path, "64M"))
    qemu_io(path, "qed", "write -P 1 0 1M")
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(4 << 16))
    result = cowfs("check", "-r", "leaks", path)
    assert result.returncode == 0
    assert "    4 leaked clusters\n    0 corruptions\n" in result.stdout
    assert path.stat().st_size == size
    assert qemu_img("check", path).returncode == 0

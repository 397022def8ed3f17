from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that are the same, that differ here and there, and that differ in size."""
    here = tmp_path_factory.mktemp("images")
    raw = here / "a.raw"
    ok(qemu_img("create", "-f", "raw", raw, "5M"))
    qemu_io(raw, "raw", "write -P 1 0 64k", "write -P 2 3M 1M")
    for format in ("qcow2", "qed"):
        ok(qemu_img("convert", "-O", format, raw, here / f"a.{format}"))
    ok(qemu_img("convert", "-c", "-O", "qcow2", raw, here / "packed.qcow2"))
    ok(qemu_img("create", "-f", "qcow2", "-b", "a.qed", "-F", "qed", here / "over.qcow2"))
    ok(qemu_img("create", "-f", "qcow2", "-b", "a.qed", "-F", "qed", here / "late.qcow2"))
    qemu_io(here / "late.qcow2", "qcow2", "write -P 3 4718595 1")
    ok(qemu_img("create", "-f", "qed", "-b", "a.raw", "-F", "raw", here / "zeroed.qed"))
    qemu_io(here / "zeroed.qed", "qed", "write -z 0 64k")
    for name, content in (("larger.raw", b""), ("larger-data.raw", b"x")):
        data = raw.read_bytes().ljust(6 << 20, b"\0") + content
        (here / name).write_bytes(data.ljust(7 << 20, b"\0"))
    ok(qemu_img("create", "-f", "qcow2", here / "empty.qcow2", "5M"))
    ok(qemu_img("create", "-f", "raw", here / "zero.raw", "5M"))
    (here / "odd.raw").write_bytes(b"odd" * 333_333)
    ok(qemu_img("convert", "-O", "qcow2", here / "odd.raw", here / "odd.qcow2"))
    return here


_PAIRS = [
    ("a.raw", "a.raw"),
    ("a.raw", "a.qcow2"),
    ("a.qed", "a.qcow2"),
    ("packed.qcow2", "a.raw"),
    ("over.qcow2", "a.raw"),
    ("late.qcow2", "a.raw"),
    ("a.raw", "late.qcow2"),
    ("zeroed.qed", "a.raw"),
    ("a.raw", "larger.raw"),
    ("larger.raw", "a.qcow2"),
    ("a.qcow2", "larger-data.raw"),
    ("larger-data.raw", "a.qcow2"),
    ("larger-data.raw", "empty.qcow2"),
    ("empty.qcow2", "zero.raw"),
    ("empty.qcow2", "empty.qcow2"),
    ("odd.raw", "odd.raw"),
    ("a.raw", "odd.raw"),
]


@pytest.mark.parametrize(("a", "b"), _PAIRS)
@pytest.mark.parametrize("strict", [[], ["-s"]], ids=["content", "strict"])
def test_compare_says_what_qemu_img_says(images: Path, a: str, b: str, strict: list[str]) -> None:
    theirs = qemu_img("compare", *strict, a, b, cwd=images)
    ours = cowfs("compare", *strict, a, b, cwd=images)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, "")
    quiet = cowfs("compare", "-q", *strict, a, b, cwd=images)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (theirs.returncode, "", "")


def test_a_raw_disk_has_whole_sectors(images: Path) -> None:
    # in strict mode, qemu-img finds such a file's last sector different all the way from its start
    assert ok(qemu_img("compare", "odd.raw", "odd.qcow2", cwd=images)) == "Images are identical.\n"
    assert ok(cowfs("compare", "odd.raw", "odd.qcow2", cwd=images)) == "Images are identical.\n"


def test_the_formats_of_both_can_be_told(images: Path) -> None:
    out = ok(cowfs("compare", "-f", "raw", "-F", "raw", "a.qcow2", "a.qcow2", cwd=images))
    assert out == "Images are identical.\n"
    assert "not a qcow2 image" in refusal(cowfs("compare", "-F", "qcow2", "a.raw", "a.raw", cwd=images), 2)


def test_progress_ends_at_all_of_it(images: Path) -> None:
    out = ok(cowfs("compare", "-p", "a.raw", "a.qcow2", cwd=images))
    # read as text, a carriage return is an end of line
    assert out.splitlines()[-2:] == ["    (100.00/100%)", "Images are identical."]


def test_what_cannot_be_compared_is_no_difference(images: Path) -> None:
    assert "gone.raw: cannot open" in refusal(cowfs("compare", "a.raw", "gone.raw", cwd=images), 2)
    refusal(cowfs("compare", "a.raw", cwd=images), 2)

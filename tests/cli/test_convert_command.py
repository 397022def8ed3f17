"""``cowfs convert``, judged by QEMU's tools."""

import os
import random
import subprocess
from pathlib import Path

import pytest
from commandline import PATIENCE, cowfs, ok, qemu_img, qemu_io, refusal

SIZE = 9_000_448
TARGETS = {
    "raw": ["-O", "raw"],
    "qcow2": ["-O", "qcow2"],
    "qcow2-v2-512": ["-O", "qcow2", "-o", "compat=0.10,cluster_size=512"],
    "qcow2-extended": ["-O", "qcow2", "-o", "extended_l2=on"],
    "qed": ["-O", "qed", "-o", "cluster_size=8k,table_size=2"],
    "packed": ["-c", "-O", "qcow2"],
    "packed-zstd-4k": ["-c", "-O", "qcow2", "-o", "compression_type=zstd,cluster_size=4k"],
    "packed-narrow": ["-c", "-O", "qcow2", "-o", "refcount_bits=1,cluster_size=64k"],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A qcow2 overlay on a shorter raw base: random, repetitive, zero and absent parts."""
    rnd = random.Random(1)
    base = tmp_path / "base.raw"
    base.write_bytes(rnd.randbytes(2_000_384) + bytes(1_000_448) + b"again and again " * 60_000)
    path = tmp_path / "source.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, str(SIZE)))
    qemu_io(path, "qcow2", "write -P 7 512 100k", "write -z 1M 300k", "write -P 9 8M 4k")
    return path


def same(first: Path, second: Path) -> None:
    ok(qemu_img("compare", first, second))


def clean(path: Path) -> None:
    done = qemu_img("check", "-q", path)
    assert done.returncode in (0, 63), done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_every_format_from_a_chain(source: Path, tmp_path: Path, target: str) -> None:
    made = tmp_path / "made"
    ok(cowfs("convert", *TARGETS[target], source, made))
    same(source, made)
    if target != "raw":
        clean(made)
    # and back
    ok(cowfs("convert", "-O", "raw", made, tmp_path / "flat"))
    same(source, tmp_path / "flat")


@pytest.mark.parametrize("target", [name for name in TARGETS if "packed" in name])
def test_packed_clusters_are_smaller_and_can_be_overwritten(source: Path, tmp_path: Path, target: str) -> None:
    made, plain = tmp_path / "made", tmp_path / "plain"
    ok(cowfs("convert", *TARGETS[target], source, made))
    ok(cowfs("convert", "-O", "qcow2", source, plain))
    assert made.stat().st_blocks < plain.stat().st_blocks
    rnd = random.Random(2)
    for number in range(12):
        offset = rnd.randrange(SIZE // 512 - 200) * 512
        qemu_io(plain, "qcow2", f"write -P {number + 1} {offset} 70k")
        qemu_io(made, "qcow2", f"write -P {number + 1} {offset} 70k")
    clean(made)
    same(made, plain)


def test_an_overlay_takes_only_what_the_source_itself_holds(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ok(cowfs("convert", "-O", "qcow2", "-B", "base.raw", "-F", "raw", source, made))
    same(source, made)
    clean(made)
    assert made.stat().st_blocks < 2 * source.stat().st_blocks
    assert '"full-backing-filename"' in ok(qemu_img("info", "--output=json", made))


def test_sources_follow_each_other_and_an_existing_target_is_filled(source: Path, tmp_path: Path) -> None:
    first, target = tmp_path / "first", tmp_path / "target"
    first.write_bytes(b"head" * 4096)
    ok(qemu_img("create", "-q", "-f", "qed", target, "20M"))
    qemu_io(target, "qed", "write -P 3 0 20M")
    ok(cowfs("convert", "-n", "-O", "qed", first, source, target))
    ok(qemu_img("convert", "-O", "raw", first, source, tmp_path / "joined"))
    joined = (tmp_path / "joined").read_bytes()
    ok(qemu_img("convert", "-O", "raw", target, tmp_path / "flat"))
    assert (tmp_path / "flat").read_bytes() == joined + b"\3" * ((20 << 20) - len(joined))
    clean(target)


def test_zeros_take_no_space(tmp_path: Path) -> None:
    image = tmp_path / "zeros"
    image.write_bytes(bytes(4 << 20) + os.urandom(65536) + bytes(4 << 20))
    for format in ("raw", "qcow2", "qed"):
        made = tmp_path / f"made.{format}"
        ok(cowfs("convert", "-O", format, image, made))
        same(image, made)
        assert made.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("words", "place"),
    [(["-l", "one"], 1), (["-l", "1"], 1), (["-l", "snapshot.name=1"], 2), (["-l", "snapshot.id=2"], 2), ([], 3)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_snapshot_inside_the_source(tmp_path: Path, words: list[str], place: int) -> None:
    """An id counts before a name, but for keys."""
    image, made, expected = tmp_path / "image", tmp_path / "made", tmp_path / "expected"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "4M"))
    # the second has the first one's id for a name
    for number, name in ((1, "one"), (2, "1"), (3, "")):
        qemu_io(image, "qcow2", f"write -P {number} {number}M 700k")
        if name:
            ok(qemu_img("snapshot", "-c", name, image))
    ok(cowfs("convert", *words, "-O", "raw", image, made))
    ok(qemu_img("convert", *words, "-O", "raw", image, expected))
    assert made.read_bytes() == expected.read_bytes()
    assert max(made.read_bytes()) == place


def test_a_target_that_is_known_to_be_zero(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ok(qemu_img("create", "-q", "-f", "qcow2", made, str(SIZE)))
    ok(cowfs("convert", "-n", "--target-is-zero", "-O", "qcow2", source, made))
    same(source, made)
    clean(made)
    # whoever says so of one that is not gets what was there: that no zeros are written is the point
    qemu_io(made, "qcow2", "write -P 77 6M 64k")
    ok(cowfs("convert", "-n", "--target-is-zero", "-O", "qcow2", source, made))
    assert qemu_img("compare", source, made).returncode == 1
    over = tmp_path / "over"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", made, "-F", "qcow2", over))
    sentence = refusal(cowfs("convert", "-n", "--target-is-zero", "-O", "qcow2", source, over))
    assert sentence == f"{over}: has a backing file, so it does not read as zeros"


def test_hints_on_how_to_copy_change_nothing(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ok(cowfs("convert", "-W", "-m", "16", "-t", "none", "-T", "none", "-r", "1G", "-O", "qcow2", source, made))
    same(source, made)
    clean(made)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-l", "none", "source.qcow2", "made"], "source.qcow2: there is no snapshot 'none'"),
        (["-l", "one", "source.qcow2", "base.raw", "made"], "-l is for one source"),
        (["--target-is-zero", "source.qcow2", "made"], "--target-is-zero needs -n"),
        (["-m", "17", "source.qcow2", "made"], "17"),
        (["-r", "fast", "source.qcow2", "made"], "'fast' is not a size"),
        (["missing", "made"], "missing: cannot open: No such file or directory"),
        (
            ["source.qcow2", "source.qcow2"],
            "source.qcow2: is one of the sources, and cannot be written at the same time",
        ),
        (["-O", "qed", "-c", "source.qcow2", "made"], "made: "),
        (["-O", "nonsense", "source.qcow2", "made"], "unknown format 'nonsense'"),
        (["-O", "qcow2", "-o", "cluster_size=3", "source.qcow2", "made"], "cluster_size=3 is not"),
        (["-S", "3", "source.qcow2", "made"], "-S takes multiples of 512"),
        (["source.qcow2"], ""),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(source: Path, words: list[str], sentence: str) -> None:
    before = {path.name: path.read_bytes() for path in source.parent.iterdir()}
    assert sentence in refusal(cowfs("convert", *words, cwd=source.parent))
    assert {path.name: path.read_bytes() for path in source.parent.iterdir()} == before


def test_a_full_disk_leaves_no_half_made_image(source: Path) -> None:
    command = f"ulimit -f 500; exec {cowfs('--version').args[0]} -m cowfs convert -O qcow2 source.qcow2 made"
    done = subprocess.run(
        ["bash", "-c", command], cwd=source.parent, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode != 0
    assert done.stderr.startswith("cowfs: ")
    assert done.stderr.count("\n") == 1
    assert not (source.parent / "made").exists()

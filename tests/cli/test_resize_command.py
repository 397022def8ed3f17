"""``cowfs resize``: offline beside ``qemu-img resize``, and on a disk of a mount."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from imagetools import assert_clean, qemu_content
from mounting import Mounts

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

M = 1 << 20


@pytest.fixture(params=["qcow2", "raw"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"image.{request.param}"
    ok(qemu_img("create", "-q", "-f", request.param, path, "8M"))
    qemu_io(path, request.param, "write -P 5 0 8M")
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "vm.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", path, "8M"))
    qemu_io(path, "qcow2", "write -P 5 0 8M")
    return path


def size_of(image: Path) -> int:
    return int(json.loads(ok(qemu_img("info", "--output=json", image)))["virtual-size"])


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("16M",), 16 * M),
        (("+1M",), 9 * M),
        (("8M",), 8 * M),
        (("--shrink", "2M"), 2 * M),
        (("--shrink", "-512k"), 8 * M - 512 * 1024),
        (("--shrink", "--", "-1.5M"), 6 * M + M // 2),
        (("--shrink", "+1k"), 8 * M + 1024),
    ],
)
def test_sizes_as_qemu_img_takes_them(image: Path, words: tuple[str, ...], size: int) -> None:
    options, last = words[:-1], words[-1]
    format = image.suffix[1:]
    assert ok(cowfs("resize", "-f", format, *options, image, last)) == "Image resized.\n"
    assert size_of(image) == size
    flat = (b"\5" * min(size, 8 * M)).ljust(size, b"\0")
    if format == "qcow2":
        assert_clean(image)
        assert qemu_content(image) == flat
    else:
        assert image.read_bytes() == flat


def test_quiet(image: Path) -> None:
    assert ok(cowfs("resize", "-q", "-f", image.suffix[1:], image, "9M")) == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("4M",), "cutting the disk from 8388608 to 4194304 bytes loses what lies behind; --shrink allows it"),
        (("-4M",), "cutting the disk from 8388608 to 4194304 bytes loses what lies behind; --shrink allows it"),
        (("--shrink", "-8M"), "the new size must be more than nothing"),
        (("--shrink", "0"), "the new size must be more than nothing"),
        (("20x",), "'20x' is not a size; write a number with an optional suffix k, M, G or T"),
        (("8388609",), "8388609 bytes is no multiple of 512, as sizes of qcow2 images are"),
        (("--shrink", "1000"), "1000 bytes is no multiple of 512, as sizes of qcow2 images are"),
        (("+8E",), "'8E' is too large"),
    ],
)
def test_refusals_change_nothing(qcow2: Path, words: tuple[str, ...], sentence: str) -> None:
    before = qcow2.read_bytes()
    options, last = words[:-1], words[-1]
    assert refusal(cowfs("resize", *options, qcow2, last)) == f"{qcow2}: {sentence}"
    assert qcow2.read_bytes() == before


def test_options_that_there_are_not(qcow2: Path) -> None:
    sentence = "no such option: -x; see 'cowfs resize --help'"
    assert refusal(cowfs("resize", qcow2, "-x"), 2) == sentence
    assert "see 'cowfs resize --help'" in refusal(cowfs("resize", "--nonsense", qcow2, "8M"), 2)
    assert "missing argument" in refusal(cowfs("resize", qcow2), 2)


def test_qed_only_grows(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ok(qemu_img("create", "-q", "-f", "qed", path, "1M"))
    assert refusal(cowfs("resize", "--shrink", path, "512k")) == f"{path}: qed images cannot be made smaller"
    ok(cowfs("resize", path, "2M"))
    assert size_of(path) == 2 * M


# -- live


@pytest.mark.needs("fuse")
def test_a_mounted_disk_grows_and_shrinks_under_its_users(qcow2: Path, mount: Mounts) -> None:
    mounted = mount(qcow2)
    flat = mounted.flat("vm")
    with flat.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"dirty", 8 * M - 5)
        assert ok(cowfs("resize", flat, "+4M")) == "Image resized.\n"
        assert os.fstat(file.fileno()).st_size == 12 * M
        assert os.pread(file.fileno(), 10, 8 * M - 5) == b"dirty\0\0\0\0\0"
        os.pwrite(file.fileno(), b"end", 12 * M - 3)
        assert mounted.control("vm", "resize").read_text() == f"{12 * M}\n"
        before = refusal(cowfs("resize", flat, "2M"))
        assert "--shrink allows it" in before
        ok(cowfs("resize", "--shrink", flat, "2M"))
        assert os.fstat(file.fileno()).st_size == 2 * M
        assert os.pread(file.fileno(), 100, 2 * M - 1) == b"\5"
        # what was cut off does not come back, neither from the image nor from the kernel's cache
        ok(cowfs("resize", flat, "8M"))
        assert os.pread(file.fileno(), 6 * M, 2 * M) == bytes(6 * M)
        os.pwrite(file.fileno(), b"again", 5 * M)
    mounted.umount()
    assert_clean(qcow2)
    model = bytearray((b"\5" * (2 * M)).ljust(8 * M, b"\0"))
    model[5 * M : 5 * M + 5] = b"again"
    assert qemu_content(qcow2) == model


@pytest.mark.needs("fuse")
def test_the_control_file(qcow2: Path, mount: Mounts) -> None:
    mounted = mount(qcow2)
    control, flat = mounted.control("vm", "resize"), mounted.flat("vm")
    control.write_text("+1M")
    assert flat.stat().st_size == 9 * M
    control.write_text("-1M shrink\n")
    assert flat.stat().st_size == 8 * M
    for text, error, sentence in (
        ("4M", PermissionError, "to cut the disk from 8388608 to 4194304 bytes, add the word shrink"),
        ("4M grow", OSError, "'4M grow' is no command"),
        ("much", OSError, "'much' is not a size"),
        ("-8M shrink", OSError, "the new size must be more than nothing"),
        ("1000 shrink", OSError, "1000 bytes is no multiple of 512"),
    ):
        with pytest.raises(error):
            control.write_text(text)
        assert sentence in mounted.control("vm", "error").read_text()
        assert flat.stat().st_size == 8 * M
    with pytest.raises(PermissionError):
        os.truncate(flat, M)
    control.write_text("9M")
    assert mounted.control("vm", "error").read_text() == ""
    mounted.umount()
    mounted = mount("-o", "ro", qcow2)
    assert "Read-only" in refusal(cowfs("resize", mounted.flat("vm"), "16M"))


@pytest.mark.needs("fuse")
def test_no_format_live(qcow2: Path, mount: Mounts) -> None:
    flat = mount(qcow2).flat("vm")
    assert refusal(cowfs("resize", "-f", "raw", flat, "16M")) == (
        f"{flat}: --format is for image files; this disk is open already"
    )


@pytest.mark.needs("fuse", "root", "loop", "losetup")
def test_a_loop_device_learns_of_it(qcow2: Path, mount: Mounts) -> None:
    flat = mount(qcow2).flat("vm")
    device = ok(cowfs("attach", flat)).strip()
    try:
        for words, size in ((("16M",), 16 * M), (("--shrink", "4M"), 4 * M)):
            options, last = words[:-1], words[-1]
            ok(cowfs("resize", *options, flat, last))
            subprocess.run(["losetup", "-c", device], check=True)
            assert int(Path(f"/sys/block/{Path(device).name}/size").read_text()) * 512 == size
    finally:
        ok(cowfs("detach", flat))

"""New overlays on top of disks that are in use."""

import errno
import os
import random
import threading
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from imagetools import assert_clean, qemu_content
from mounting import Mounts, wait_for

MIB = 1 << 20

pytestmark = pytest.mark.needs("root", "fuse", "qemu-img")


def content(image: Path, format: str) -> bytes:
    out = image.with_name("out.raw")
    ok(qemu_img("convert", "-f", format, "-O", "raw", image, out))
    return out.read_bytes()


@pytest.mark.parametrize(("format", "new"), [("qcow2", "qcow2"), ("qed", "qcow2"), ("qcow2", "qed"), ("raw", "qcow2")])
def test_the_disk_goes_on_and_the_old_image_keeps_what_it_was(
    mount: Mounts, tmp_path: Path, format: str, new: str
) -> None:
    base, image, top = tmp_path / "base.raw", tmp_path / "image", tmp_path / "top.img"
    model = bytearray(random.Random(1).randbytes(8 * MIB))
    if format == "raw":
        image.write_bytes(model)
    else:
        base.write_bytes(model)
        ok(qemu_img("create", "-q", "-f", format, "-o", "cluster_size=4k", "-b", base, "-F", "raw", image))
    mounted = mount("-o", f"format={format},no-writeback-cache", image)
    flat = mounted.flat("image")
    with flat.open("r+b", buffering=0) as file:

        def write(seed: int) -> None:
            chooser = random.Random(seed)
            for _ in range(60):
                length = chooser.choice([512, 4096, 9000, 100_000])
                offset = chooser.randrange(8 * MIB - length)
                data = chooser.randbytes(length)
                assert os.pwrite(file.fileno(), data, offset) == length
                model[offset : offset + length] = data

        write(2)
        before = bytes(model)
        mounted.control("image", "snapshot").write_text(f"create {top.name} format={new}\n")
        assert mounted.control("image", "snapshot").read_text() == f"{top}\n"
        chain = mounted.control("image", "chain").read_text().splitlines()
        assert chain[:2] == [
            f"{len(chain) - 1} {new} {8 * MIB} {top}",
            f"{len(chain) - 2} {format} {8 * MIB} {image}",
        ]
        assert flat.read_bytes() == before
        write(3)
        assert flat.read_bytes() == model
        assert (mounted.point / f".cowfs/image/layers/{len(chain) - 2}").read_bytes() == before
    mounted.umount()
    assert content(image, format) == before
    assert content(top, new) == model
    for path, kind in ((image, format), (top, new)):
        if kind != "raw":
            ok(qemu_img("check", "-q", "-f", kind, path))
    ok(cowfs("map", top))


def test_a_writer_feels_nothing_but_a_pause(mount: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "8M"))
    mounted = mount(image)
    model = bytearray(8 * MIB)
    stop = threading.Event()
    failures: list[str] = []
    rounds = 0

    def work() -> None:
        nonlocal rounds
        chooser = random.Random(1)
        with mounted.flat("image").open("r+b", buffering=0) as file:
            while not stop.is_set():
                offset = chooser.randrange(8 * MIB // 4096) * 4096
                model[offset : offset + 4096] = chooser.randbytes(4096)
                os.pwrite(file.fileno(), model[offset : offset + 4096], offset)
                if chooser.random() < 0.05:
                    os.fsync(file.fileno())
                if os.pread(file.fileno(), 4096, offset) != model[offset : offset + 4096]:
                    failures.append(f"{offset:#x}")
                rounds += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(5):
            seen = rounds
            wait_for("the writer", lambda seen=seen: rounds > seen + 50)  # type: ignore[misc]
            ok(cowfs("snapshot", "-c", f"s{number}.qcow2", mounted.flat("image")))
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert mounted.flat("image").read_bytes() == model
    mounted.umount()
    assert content(tmp_path / "s4.qcow2", "qcow2") == model
    for path in (image, *(tmp_path / f"s{number}.qcow2" for number in range(5))):
        ok(qemu_img("check", "-q", path))


def test_what_is_refused_changes_nothing(mount: Mounts, tmp_path: Path) -> None:
    base, image, other = tmp_path / "base.raw", tmp_path / "image.qcow2", tmp_path / "other"
    base.write_bytes(os.urandom(8 * MIB))
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image))
    other.write_bytes(b"precious")
    mounted = mount(image)
    flat = mounted.flat("image")
    assert refusal(cowfs("snapshot", "-c", str(other), flat)).endswith(f"{other}: exists already")
    assert other.read_bytes() == b"precious"
    for text, sentence in (
        ("create x format=raw", "raw images cannot have a backing file"),
        ("create x format=vmdk", "unknown format"),
        ("create", "is no command"),
        ("make x", "is no command"),
        ("create /nowhere/x", "No such file"),
        (f"create {mounted.point}/x", "lies inside the mount"),
    ):
        with pytest.raises(OSError):
            mounted.control("image", "snapshot").write_text(text)
        assert sentence in mounted.control("image", "error").read_text(), text
    mounted.control("image", "stream").write_text("start speed=1")
    assert "a stream job is running" in refusal(cowfs("snapshot", "-c", "x", flat))
    mounted.control("image", "stream").write_text("cancel")
    assert not (tmp_path / "x").exists()
    assert len(mounted.control("image", "chain").read_text().splitlines()) == 2
    mounted.umount()
    mounted = mount("-o", "ro", image)
    assert "Read-only" in refusal(cowfs("snapshot", "-c", "x", mounted.flat("image")))
    assert not (tmp_path / "x").exists()


def test_it_is_there_after_a_crash(mount: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", image, "8M"))
    mounted = mount(image)
    data = os.urandom(MIB)
    with mounted.flat("image").open("r+b") as file:
        file.write(data)
    ok(cowfs("snapshot", "-c", "top.qcow2", mounted.flat("image")))
    os.kill(mounted.pid, 9)
    wait_for("the end of the server", lambda: qemu_img("info", image).returncode == 0)
    ok(qemu_img("check", "-q", image))
    ok(qemu_img("check", "-q", tmp_path / "top.qcow2"))
    assert content(tmp_path / "top.qcow2", "qcow2")[:MIB] == data


def test_internal_snapshots_keep_what_they_take_from_below(mount: Mounts, tmp_path: Path) -> None:
    """Jobs of a mounted disk that would take it from them are refused at once, and do that for an image file."""
    base, top = tmp_path / "base.raw", tmp_path / "vm.qcow2"
    base.write_bytes(b"b" * MIB)
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", top))
    qemu_io(top, "qcow2", "write -P 1 0 128k")
    ok(cowfs("snapshot", "-q", "-c", "s1", top))
    qemu_io(top, "qcow2", "write -P 2 64k 256k")
    kept, content = qemu_content(top, "-l", "s1"), qemu_content(top)
    mounted = mount(top)
    for verb, words in (("stream", "start"), ("commit", "start"), ("commit", "start pivot=yes")):
        with pytest.raises(OSError, match="busy") as caught:
            mounted.control("vm", verb).write_text(words)
        assert caught.value.errno == errno.EBUSY
        said = mounted.control("vm", "error").read_text()
        assert said.startswith(f"{top}: ")
        assert "its internal snapshot 's1'" in said
        assert mounted.job("vm", verb)["state"] == "none"
        assert said.strip() in refusal(cowfs(verb, *(["--pivot"] if "pivot" in words else []), mounted.flat("vm")))
    mounted.flat("vm").read_bytes()
    mounted.umount()
    assert (base.read_bytes(), qemu_content(top, "-l", "s1")) == (b"b" * MIB, kept)
    for verb in ("commit", "stream"):
        ok(cowfs(verb, "-q", top))
        assert (qemu_content(top, "-l", "s1"), qemu_content(top)) == (kept, content)
        assert_clean(top)
    base.unlink()
    mounted = mount(top)
    ok(cowfs("snapshot", "-q", "-c", "next.qcow2", mounted.flat("vm")))
    mounted.umount()
    assert qemu_content(top, "-l", "s1") == kept
    ok(cowfs("snapshot", "-q", "-a", "s1", top))
    assert qemu_content(top) == kept

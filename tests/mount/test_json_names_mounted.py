"""Disks of a mount whose files have ``json:`` names, on top and below."""

import json
import os
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounts

pytestmark = pytest.mark.needs("root", "fuse", "qemu-img", "qemu-io")

MIB = 1 << 20


def backing(image: Path | str) -> str:
    name: str = json.loads(ok(qemu_img("info", "-U", "--output=json", image)))["backing-filename"]
    return name


@pytest.fixture
def holder(tmp_path: Path) -> Path:
    path = tmp_path / "holder"
    path.write_bytes(os.urandom(8 * MIB))
    return path


def chain(tmp_path: Path, base: str) -> Path:
    """Two overlays, that name what is below as libvirt does."""
    mid, top = tmp_path / "mid.qcow2", tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", mid))
    name = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{mid}"}}}}'
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", top))
    qemu_io(mid, "qcow2", "write -P 1 1M 1M")
    qemu_io(top, "qcow2", "write -P 2 100k 1M")
    return top


@pytest.mark.parametrize("verb", ["stream", "commit"])
@pytest.mark.parametrize("part", [False, True])
def test_jobs_keep_the_name_as_it_is_recorded(
    mount: Mounts, tmp_path: Path, holder: Path, verb: str, part: bool
) -> None:
    before = holder.read_bytes()
    place = f'"offset":{MIB},"size":{4 * MIB},' if part else ""
    # odd spaces, that whoever writes it anew would not put there
    base = f'json: {{ "driver":"raw",{place} "file":{{"driver":"file", "filename":"{holder}"}}}}'
    top = chain(tmp_path, base)
    mounted = mount(top)
    seen = mounted.flat("top").read_bytes()
    assert seen[3 * MIB :] == (before[4 * MIB : 5 * MIB] if part else before[3 * MIB :])
    ok(cowfs(verb, "-q", "--base", "0", mounted.flat("top")))
    assert mounted.flat("top").read_bytes() == seen
    with mounted.flat("top").open("r+b") as file:
        file.write(b"9" * 4096)
    ok(cowfs("snapshot", "-q", "-c", "new.qcow2", mounted.flat("top")))
    seen = mounted.flat("top").read_bytes()
    mounted.umount()
    assert backing(top) == base
    for image in (top, tmp_path / "new.qcow2"):
        ok(qemu_img("check", "-q", image))
    ok(qemu_img("convert", "-O", "raw", tmp_path / "new.qcow2", tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == seen
    if part or verb == "stream":
        assert holder.read_bytes()[:MIB] == before[:MIB]
        assert holder.read_bytes()[5 * MIB :] == before[5 * MIB :]


def test_a_part_is_mounted_and_nothing_else_is_written(mount: Mounts, tmp_path: Path, holder: Path) -> None:
    before = holder.read_bytes()
    name = f'json:{{"driver":"raw","offset":{MIB},"size":{2 * MIB},"file.filename":"holder"}}'
    point = mount.new_point()
    ok(cowfs("mount", "-o", "format=raw", f"part={name}", point, cwd=tmp_path))
    try:
        flat = point / "part"
        assert flat.read_bytes() == before[MIB : 3 * MIB]
        with flat.open("r+b") as file:
            file.write(b"7" * MIB)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fallocate(file.fileno(), 0, 512)
        assert refusal(cowfs("resize", flat, "3M"))
        ok(cowfs("snapshot", "-q", "-c", "over.qcow2", flat))
        with flat.open("r+b") as file:
            file.write(b"8" * 512)
        shown = (point / ".cowfs/part/chain").read_text().splitlines()[-1]
        assert str(holder) in shown
        os.statvfs(point)
    finally:
        ok(cowfs("umount", point))
    assert holder.read_bytes() == before[:MIB] + b"7" * MIB + before[2 * MIB :]
    ok(qemu_img("convert", "-O", "raw", tmp_path / "over.qcow2", tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == (b"8" * 512 + b"7" * (MIB - 512) + before[2 * MIB : 3 * MIB])


def test_an_image_of_a_format_is_mounted_and_added(mount: Mounts, tmp_path: Path, holder: Path) -> None:
    top = chain(tmp_path, str(holder))
    name = f"json:{{'driver':'qcow2','file':{{'driver':'file','filename':'{top}'}}}}"
    mounted = mount(name)
    assert mounted.control("top", "chain").read_text().splitlines()[0].endswith(f" {top}")
    other = f'json:{{"driver":"raw","size":{MIB},"file.filename":"{holder}"}}'
    ok(cowfs("add", "-r", mounted.point, f"odd={other}"))
    assert mounted.flat("odd").read_bytes() == holder.read_bytes()[:MIB]
    assert "one of them would write" in refusal(cowfs("add", mounted.point, f"part={other}"))
    assert "is to be opened read-only" in refusal(
        cowfs("add", mounted.point, f'x=json:{{"driver":"raw","read-only":true,"file.filename":"{tmp_path}/out"}}')
    )
    with pytest.raises(OSError):
        (mounted.point / ".cowfs/control").write_text('add x=json:{"file.filename":"relative"}')
    assert "is no absolute path" in (mounted.point / ".cowfs/error").read_text()
    inside = f'json:{{"driver":"raw","offset":512,"file.filename":"{mounted.flat("top")}"}}'
    assert "lies inside the mount" in refusal(cowfs("add", mounted.point, f"y={inside}"))


def test_a_header_with_a_relative_name_inside_is_refused(mount: Mounts, tmp_path: Path, holder: Path) -> None:
    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", 'json:{"file.filename":"holder"}', "-F", "raw", top, "8M"))
    assert "a mount needs an absolute path" in refusal(cowfs("mount", top, mount.new_point(), cwd=tmp_path))

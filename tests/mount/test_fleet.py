"""Hundreds of clones of one golden image in one mount."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, refusal
from mounting import Mounts, shell, wait_for_end

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img")]

MIB = 1 << 20
COUNT = 200


@pytest.fixture(params=["raw", "qcow2"])
def clones(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Overlays of 1 MiB over one base, nothing in them yet."""
    plain = tmp_path / "golden.raw"
    plain.write_bytes(os.urandom(MIB))
    base = plain
    if request.param != "raw":
        base = tmp_path / "golden.qcow2"
        ok(qemu_img("convert", "-O", "qcow2", plain, base))
    first = tmp_path / "vm0.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", request.param, first))
    made = [tmp_path / f"vm{number}.qcow2" for number in range(COUNT + 2)]
    for path in made[1:]:
        shutil.copyfile(first, path)
    return made


def test_many_clones_of_one_image(mount: Mounts, clones: list[Path]) -> None:
    golden = clones[0].with_name("golden.raw").read_bytes()
    before = {path: path.read_bytes() for path in clones[0].parent.glob("golden.*")}
    mounted = mount("-o", "no-copy-on-read", *clones[:COUNT])
    names = [path.stem for path in clones[:COUNT]]
    assert sorted(os.listdir(mounted.point)) == sorted([".cowfs", *names])  # noqa: PTH208
    assert [mounted.flat(name).read_bytes() == golden for name in names] == [True] * COUNT
    for number, name in enumerate(names):
        with open(mounted.flat(name), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), number.to_bytes(4, "big") * 1024, number * 4096)
    for number, name in enumerate(names):
        expected = bytearray(golden)
        expected[number * 4096 : (number + 1) * 4096] = number.to_bytes(4, "big") * 1024
        assert mounted.flat(name).read_bytes() == expected, name
    ok(cowfs("add", mounted.point, *clones[COUNT:]))
    ok(cowfs("remove", *(mounted.flat(name) for name in names[:3])))
    assert [mounted.flat(path.stem).read_bytes() == golden for path in clones[COUNT:]] == [True, True]
    assert not mounted.flat(names[0]).exists()
    assert len(mounted.status()["images"]) == COUNT - 1
    ok(cowfs("stream", "-q", mounted.flat(names[3])))
    mounted.umount()
    wait_for_end(mounted.process)
    assert {path: path.read_bytes() for path in before} == before
    for path in (clones[0], clones[3], clones[COUNT - 1], clones[COUNT]):
        assert qemu_img("check", path).returncode == 0
    out = clones[7].with_suffix(".raw")
    ok(qemu_img("convert", "-O", "raw", clones[7], out))
    assert out.read_bytes()[7 * 4096 :][:4096] == (7).to_bytes(4, "big") * 1024


@pytest.mark.parametrize("clones", ["raw"], indirect=True)
def test_more_files_than_a_process_has_by_default(mount: Mounts, clones: list[Path]) -> None:
    """The soft limit is no limit, the hard one is."""
    point = mount.new_point()
    few, all_of_them = " ".join(map(str, clones[:20])), " ".join(map(str, clones[:60]))
    start = f"ulimit -Sn 48; ulimit -Hn 128; {sys.executable} -m cowfs mount"
    refused = shell(f"{start} {all_of_them} {point}")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "is one image too many: the server may have no more than 128 files open" in refused.stderr
    assert not os.path.ismount(point)
    assert shell(f"{start} {few} {point}").stderr == ""
    line = refusal(cowfs("add", point, *clones[20:60]))
    assert "is one image too many" in line
    assert len(os.listdir(point)) - 1 > 20  # noqa: PTH208
    # what is there goes on
    assert (point / "vm0").read_bytes() == (point / "vm19").read_bytes()
    ok(cowfs("snapshot", "-c", "next.qcow2", point / "vm0"))
    ok(cowfs("umount", point))

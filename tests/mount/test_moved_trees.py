"""Chains whose layers name each other by relative names can be moved, also after jobs and snapshots."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from mounting import Mounted, Mounts, wait_for

pytestmark = pytest.mark.needs("root", "fuse", "qemu-img", "qemu-io")

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three layers in directories side by side."""
    tree = tmp_path / "tree"
    for folder in ("a", "b", "c", "d"):
        (tree / folder).mkdir(parents=True)
    below = None
    for number, name in enumerate(("a/base", "b/mid", "c/top")):
        words = ["-b", f"../{below}.qcow2", "-F", "qcow2"] if below else ["-o", "size=4M"]
        image = tree / f"{name}.qcow2"
        ok(cowfs("create", "-q", "-f", "qcow2", *words, image))
        qemu_io(image, "qcow2", f"write -P {number + 1} {number}M 1536k")
        below = name
    return tree


def content(image: Path) -> bytes:
    out = image.parent / "content"
    ok(qemu_img("convert", "-O", "raw", image, out))
    data = out.read_bytes()
    out.unlink()
    return data


def name_in(image: Path) -> str:
    """What an image calls its backing file, by QEMU."""
    name: str = json.loads(ok(qemu_img("info", "--output=json", image)))["backing-filename"]
    return name


def move(tree: Path) -> Path:
    """Put everything elsewhere, so that an absolute name leads nowhere."""
    return tree.rename(tree.with_name("moved"))


def _commit(mounted: Mounted, *words: str) -> None:
    ok(cowfs("commit", "-q", "--base", "0", *words, mounted.flat("v")))


def _commit_between(mounted: Mounted, *words: str) -> None:
    ok(cowfs("commit", "-q", "--top", "1", "--base", "0", *words, mounted.flat("v")))


def _stream(mounted: Mounted, *words: str) -> None:
    ok(cowfs("stream", "-q", "--base", "0", *words, mounted.flat("v")))


_JOBS = [_commit, _commit_between, _stream]


@pytest.mark.parametrize("job", _JOBS)
def test_jobs_leave_relative_names(mount: Mounts, tree: Path, job: Callable[..., None]) -> None:
    before = content(tree / "c/top.qcow2")
    mounted = mount(f"v={tree}/c/top.qcow2")
    job(mounted)
    mounted.umount()
    assert name_in(tree / "c/top.qcow2") == "../a/base.qcow2"
    (tree / "b").rename(tree.with_name("gone"))
    moved = move(tree)
    assert content(moved / "c/top.qcow2") == before
    ok(qemu_img("check", "-q", moved / "c/top.qcow2"))
    mounted = mount(f"v={moved}/c/top.qcow2")
    assert mounted.flat("v").read_bytes() == before
    assert len(json.loads(ok(qemu_img("info", "-U", "--backing-chain", "--output=json", moved / "c/top.qcow2")))) == 2


@pytest.mark.parametrize("base", ["../a/base.qcow2", "a/base.qcow2"])
def test_a_stream_of_a_file_does(tree: Path, base: str) -> None:
    before = content(tree / "c/top.qcow2")
    ok(cowfs("stream", "-q", "-b", base, "c/top.qcow2", cwd=tree))
    assert name_in(tree / "c/top.qcow2") == "../a/base.qcow2"
    assert content(move(tree) / "c/top.qcow2") == before


def test_a_mount_by_a_relative_path_and_through_links(
    mount: Mounts, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("tree/c")
    monkeypatch.chdir(tmp_path)
    before = content(tree / "c/top.qcow2")
    mounted = mount("v=link/top.qcow2")
    monkeypatch.undo()
    _commit(mounted)
    ok(cowfs("snapshot", "-q", "-c", tree / "d/new.qcow2", mounted.flat("v")))
    mounted.umount()
    assert name_in(tree / "c/top.qcow2") == "../a/base.qcow2"
    moved = move(tree)
    assert content(moved / "d/new.qcow2") == before


@pytest.mark.parametrize("job", _JOBS)
@pytest.mark.parametrize("told", ["option", "mount"])
def test_names_are_as_the_user_wants_them(mount: Mounts, tree: Path, job: Callable[..., None], told: str) -> None:
    top = tree / "c/top.qcow2"
    words = ["-o", "backing-names=absolute"] if told == "mount" else []
    mounted = mount(*words, f"v={top}")
    job(mounted, *(["--backing-names", "absolute"] if told == "option" else []))
    ok(cowfs("snapshot", "-q", "-c", "new.qcow2", mounted.flat("v")))
    mounted.umount()
    assert name_in(top) == str(tree / "a/base.qcow2")
    assert name_in(tree / "c/new.qcow2") == (str(top) if told == "mount" else "top.qcow2")


@pytest.mark.parametrize("job", _JOBS)
def test_absolute_names_stay_absolute_and_can_become_relative(
    mount: Mounts, tree: Path, job: Callable[..., None]
) -> None:
    top = tree / "c/top.qcow2"
    for wanted, expected in (("relative", "../a/base.qcow2"), ("keep", str(tree / "a/base.qcow2"))):
        ok(cowfs("rebase", "-u", "-b", tree / "b/mid.qcow2", "-F", "qcow2", top))
        ok(cowfs("rebase", "-u", "-b", tree / "a/base.qcow2", "-F", "qcow2", tree / "b/mid.qcow2"))
        mounted = mount("-o", "accept-base", f"v={top}")
        job(mounted, "--backing-names", wanted)
        mounted.umount()
        assert name_in(top) == expected


def test_a_job_that_goes_on_remembers_what_was_wanted(mount: Mounts, tree: Path) -> None:
    top = tree / "c/top.qcow2"
    mounted = mount("-o", "backing-names=absolute", f"v={top}")
    mounted.control("v", "stream").write_text("start base=0 speed=64k")
    wait_for("the job", lambda: mounted.job("v", "stream")["resumes"] == "yes")
    os.kill(mounted.pid, signal.SIGTERM)
    wait_for("the end of the server", lambda: not mounted.point.is_mount())
    assert "backing-names: absolute\n" in Path(f"{top}.cowfs-job").read_text()
    mounted = mount(f"v={top}")
    mounted.control("v", "stream").write_text("speed=0")
    assert mounted.job_ended("v", "stream")["state"] == "completed"
    mounted.umount()
    assert name_in(top) == str(tree / "a/base.qcow2")


def test_a_name_that_is_too_long_is_refused_before_anything_is_copied(mount: Mounts, tree: Path) -> None:
    deep = tree / "/".join(["d" * 200] * 4)
    far = deep / "/".join(["e" * 200] * 2)
    far.mkdir(parents=True)
    base, mid, top = far / "base.raw", deep / "mid.qcow2", tree / "top.qcow2"
    base.write_bytes(os.urandom(MIB))
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base.relative_to(deep), "-F", "raw", mid))
    qemu_io(mid, "qcow2", "write -P 1 0 64k")
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", mid.relative_to(tree), "-F", "qcow2", top))
    before = [path.read_bytes() for path in (base, mid)]
    mounted = mount(f"v={top}")
    for verb in ("stream", "commit"):
        sentence = refusal(cowfs(verb, "-q", "-b", "0", mounted.flat("v")))
        assert "1023; say with backing-names" in sentence
        assert str(top) in sentence
    mounted.umount()
    assert [path.read_bytes() for path in (base, mid)] == before
    assert name_in(top) == str(mid.relative_to(tree))


def test_wrong_words_are_refused(mount: Mounts, tree: Path) -> None:
    top = tree / "c/top.qcow2"
    assert "none of keep, relative, absolute" in refusal(
        cowfs("mount", "-o", "backing-names=x", f"v={top}", mount.new_point())
    )
    mounted = mount(f"v={top}")
    for file, text in (("commit", "start backing-names=x"), ("snapshot", "create x backing-names=x")):
        with pytest.raises(OSError):
            mounted.control("v", file).write_text(text)
        assert "backing-names=x is not one of keep, relative, absolute" in mounted.control("v", "error").read_text()
    mounted.umount()
    assert "is for disks of a mount" in refusal(cowfs("commit", "--backing-names", "keep", top))

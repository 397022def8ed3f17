"""Real mounts under fio and ext4 while jobs of every kind run: whoever uses the disk sees nothing of them."""

import json
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from chains import view
from commandline import ok, qemu_img, qemu_io
from filesystems import file_system
from mounting import Mounted, Mounts, shell, wait_for
from working import at_work

pytestmark = [pytest.mark.needs("root", "fuse", "qemu-img", "qemu-io")]

MIB = 1 << 20
#: bytes; of which fio gets two parts of one third each, and nobody writes to the rest
SIZE = 24 * MIB
THIRD = SIZE // 3
#: seconds; for all jobs of a disk one after the other
PATIENCE = 600.0

#: of fio, for each part; direct, since what the kernel remembers would be no proof
LOADS = {
    "one at a time": ["--rw=randwrite", "--bs=4k", "--ioengine=psync", "--verify_backlog=64"],
    "eight at once": ["--rw=randrw", "--bsrange=4k-64k", "--ioengine=libaio", "--iodepth=8", "--fsync=40"],
}


def fio(flat: Path, part: int, options: list[str], seed: int) -> bool:
    """Write a part of a disk all over once, and verify it, what was just written and everything in the end."""
    result = subprocess.run(
        [
            "fio", f"--name=part{part}", f"--filename={flat}", "--direct=1", f"--offset={part * THIRD}",
            f"--size={THIRD}", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", f"--randseed={seed}",
            "--output-format=json", "--allow_file_create=0", "--verify_state_save=0", *options,
        ],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (job,) = json.loads(result.stdout)["jobs"]
    assert (job["error"], job["write"]["total_ios"] > 100) == (0, True)
    return True


def under_load(flat: Path) -> list[Callable[[int], bool]]:
    return [partial(fio, flat, part, options) for part, options in enumerate(LOADS.values())]


class Chain:
    """A disk in a mount, whose layers are those files, deepest first."""

    def __init__(self, folder: Path, name: str, formats: list[str], options: list[str]) -> None:
        self.name = name
        self.files: list[Path] = []
        self.formats: dict[Path, str] = {}
        self.merged: list[Path] = []
        self._folder = folder
        rnd = random.Random(name)
        for number, (format, words) in enumerate(zip(formats, options, strict=True)):
            path = folder / f"{name}{number}.{format}"
            below = ["-b", self.files[-1].name, "-F", self.formats[self.files[-1]]] if number else []
            ok(qemu_img("create", "-q", "-f", format, *(["-o", words] if words else []), *below, path, str(SIZE)))
            starts = [rnd.randrange(SIZE // 512 - 4096) * 512 for _ in range(6)]
            writes = [f"write -P {rnd.randrange(1, 256)} {start} {rnd.randrange(1, 4096) * 512}" for start in starts]
            qemu_io(path, format, *writes)
            self.files.append(path)
            self.formats[path] = format

    @property
    def top(self) -> Path:
        return self.files[-1]

    def serve(self, mounted: Mounted, *, has_rest: bool = True) -> None:
        """Look at it in a mount; ``has_rest`` says that nobody writes to the last third."""
        self.mounted = mounted
        self.flat = mounted.flat(self.name)
        self.rest = self._read_rest() if has_rest else None

    def _read_rest(self) -> bytes:
        """Return what nobody writes to, past the kernel's cache."""
        descriptor = os.open(self.flat, os.O_RDONLY | os.O_DIRECT)
        try:
            return direct(descriptor, 2 * THIRD, THIRD)
        finally:
            os.close(descriptor)

    def command(self, file: str, text: str) -> None:
        self.mounted.control(self.name, file).write_text(text)

    def verify(self, files: list[Path]) -> None:
        """The chain is what it is to be, and what nobody writes to is what it was."""
        lines = self.mounted.control(self.name, "chain").read_text().splitlines()
        assert [line.split(" ", 3)[3] for line in reversed(lines)] == [str(path) for path in files]
        assert self.rest is None or self._read_rest() == self.rest
        self.files = files

    def ended(self, verb: str) -> None:
        facts = self.mounted.job_ended(self.name, verb)
        assert (facts["state"], facts.get("error", "")) == ("completed", ""), facts

    # -- one job after the other

    def commit(self, top: int | None = None, base: int | None = None, *, pivot: str = "no") -> None:
        """Commit, paused once in between."""
        last = len(self.files) - 1
        keys = [f"{key}={value}" for key, value in (("top", top), ("base", base)) if value is not None]
        keys += [f"pivot={pivot}"] if pivot != "no" else []
        top, base = last if top is None else top, (last if top is None else top) - 1 if base is None else base
        self.command("commit", " ".join(["start", "speed=1", *keys]))
        self.command("commit", "pause")
        assert self.mounted.job(self.name, "commit")["state"] == "paused"
        self.command("commit", "resume")
        self.command("commit", "speed=0")
        if pivot == "wait":
            wait_for("the commit to be ready", lambda: self.mounted.job(self.name, "commit")["state"] == "ready")
            self.command("commit", "complete")
        self.ended("commit")
        kept = self.files[: base + 1] + (self.files[top + 1 :] if top < last else [self.top] if pivot == "no" else [])
        self.merged += [path for path in self.files if path not in kept]
        self.verify(kept)

    def stream(self, base: int | None = None) -> None:
        self.command("stream", "start" if base is None else f"start base={base}")
        self.ended("stream")
        self.verify([*(self.files[: base + 1] if base is not None else []), self.top])

    def cancel(self, verb: str) -> None:
        """Start a job that takes long, and cancel it in the middle."""
        self.command(verb, "start speed=1")
        wait_for(f"some of the {verb}", lambda: int(self.mounted.job(self.name, verb)["offset"]) > 0)
        self.command(verb, "cancel")
        assert self.mounted.job(self.name, verb)["state"] == "cancelled"
        self.verify(self.files)

    def snapshot(self, format: str) -> None:
        path = self._folder / f"{self.name}-{len(self.formats)}.{format}"
        self.command("snapshot", f"create {path.name} format={format}")
        self.formats[path] = format
        self.verify([*self.files, path])

    def everything(self, _: int) -> bool:
        """All kinds of jobs; five layers in the beginning, one in the end."""
        self.commit(top=2, base=1)
        self.snapshot("qcow2")
        self.stream(base=1)
        self.commit()
        self.commit(base=0)
        self.snapshot("qed")
        self.cancel("stream")
        self.cancel("commit")
        self.commit(base=1, pivot="wait")
        self.snapshot("qcow2")
        self.commit(base=0, pivot="yes")
        self.snapshot("qcow2")
        self.stream()
        return False

    def judge(self, content: bytes) -> None:
        """QEMU's word on the files, which nobody has open any more."""
        assert view(self.top, self.formats[self.top]) == content
        for path in self.files:
            if self.formats[path] != "raw":
                ok(qemu_img("check", "-q", "-f", self.formats[path], path))
        for path in self.merged:
            assert "merged by a commit" in qemu_img("map", path).stderr, path


def direct(descriptor: int, offset: int, length: int) -> bytes:
    """Read past the kernel's cache, which takes buffers of whole pages."""
    with mmap.mmap(-1, length) as buffer:
        assert os.preadv(descriptor, [buffer], offset) == length
        return bytes(buffer)


@pytest.mark.needs("fio")
def test_fio_sees_no_job(mount: Mounts, tmp_path: Path) -> None:
    chains = [
        Chain(tmp_path, "plain", ["raw", *["qcow2"] * 4], ["", "", "cluster_size=4k", "", ""]),
        Chain(
            tmp_path,
            "mixed",
            ["qcow2", "qed", "qcow2", "qed", "qcow2"],
            ["cluster_size=2M", "", "extended_l2=on,cluster_size=128k", "cluster_size=4k", "compat=0.10"],
        ),
    ]
    mounted = mount(*(f"{chain.name}={chain.top}" for chain in chains))
    for chain in chains:
        chain.serve(mounted)
    with at_work(*under_load(chains[0].flat), *under_load(chains[1].flat)) as loads:
        wait_for("fio", lambda: all(load.rounds or load.is_over for load in loads))
        with at_work(*(chain.everything for chain in chains)) as jobs:
            wait_for("all jobs", lambda: all(work.is_over for work in jobs), PATIENCE)
    contents = [chain.flat.read_bytes() for chain in chains]
    assert [content[2 * THIRD :] for content in contents] == [chain.rest for chain in chains]
    mounted.umount()
    for chain, content in zip(chains, contents, strict=True):
        chain.judge(content)


class Files:
    """Somebody who writes, reads and removes files, and knows what is in them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.content: dict[str, bytes] = {}

    def work(self, number: int) -> bool:
        rnd = random.Random(number)
        path = self._root / f"file{rnd.randrange(40)}"
        if path.name in self.content and rnd.random() < 0.3:
            path.unlink()
            del self.content[path.name]
            return True
        data = rnd.randbytes(rnd.choice([10, 4096, 30_000, 400_000]))
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            if rnd.random() < 0.5:
                os.fsync(file.fileno())
        self.content[path.name] = data
        name = rnd.choice(sorted(self.content))
        with (self._root / name).open("rb") as file:
            # from the disk again, if it is there already
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == self.content[name], name
        return True


@pytest.mark.needs("losetup", "loop", "mkfs.ext4", "e2fsck", "debugfs")
def test_ext4_sees_no_job(mount: Mounts, tmp_path: Path) -> None:
    chain = Chain(tmp_path, "disk", ["raw", "qcow2", "qed"], ["", "", ""])
    mounted = mount(f"disk={chain.top}")
    chain.serve(mounted, has_rest=False)
    with file_system(mounted, "disk", tmp_path, "discard") as ext4:
        files = Files(ext4.root)
        with at_work(files.work) as (writer,):

            def written() -> None:
                target = writer.rounds + 20
                wait_for("files", lambda: writer.rounds > target or writer.is_over)

            written()
            chain.snapshot("qcow2")
            written()
            chain.commit(base=1, pivot="yes")
            written()
            chain.snapshot("qcow2")
            written()
            chain.snapshot("qed")
            written()
            chain.commit(top=2, base=1)
            chain.cancel("commit")
            written()
            chain.stream(base=0)
            chain.commit(pivot="yes")
            written()
    content = chain.flat.read_bytes()
    mounted.umount()
    chain.judge(content)
    assert [path.name for path in chain.files] == ["disk0.raw"]
    checked = shell(f"e2fsck -fn {chain.top}")
    assert checked.returncode == 0, checked.stdout
    (tmp_path / "found").mkdir()
    assert shell(f"debugfs -R 'rdump / {tmp_path}/found' {chain.top}").returncode == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "found").glob("file*")}
    assert found == files.content

"""Jobs that go on after a restart by themselves, whatever ended the server."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io
from imagetools import assert_clean, qemu_check
from mounting import Mounted, Mounts, shell, wait_for, wait_for_end

from cowfs.jobs.journal import SUFFIX
from cowfs.storage.names import derived_name

pytestmark = pytest.mark.needs("root", "fuse", "qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 12 * MIB
#: bytes a second: so that a job does something soon, and then, so that it does not end before the server is told to
SOON, SLOW = "512k", 1000


class Image:
    """An overlay with data of its own over a base of random bytes."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(exist_ok=True)
        self.name = name
        self.path = directory / f"{name}.qcow2"
        self.base = directory / f"{name}.raw"
        self.base.write_bytes(os.urandom(SIZE))
        ok(qemu_img("create", "-q", "-f", "qcow2", "-b", self.base, "-F", "raw", self.path))
        qemu_io(self.path, "qcow2", *(f"write -P {number + 1} {number}M 700k" for number in range(0, 12, 2)))
        self.model = self.content()

    @property
    def journal(self) -> Path:
        return Path(f"{self.path}.cowfs-job")

    def content(self) -> bytes:
        """What QEMU reads."""
        flat = self.path.with_suffix(".flat")
        ok(qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path, flat))
        return flat.read_bytes()

    def verify(self, *, killed: bool = False) -> None:
        """The image is sound and shows what it should; a server that was killed may have left leaks."""
        if killed:
            assert not qemu_check(self.path).get("corruptions", 0)
        else:
            assert_clean(self.path)
        assert self.content() == self.model

    def is_streamed(self) -> bool:
        return "backing file" not in ok(qemu_img("info", self.path))


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "images", "d")


def command(mounted: Mounted, verb: str, *texts: str, name: str = "d") -> None:
    for text in texts:
        assert shell(f"echo {text} > {mounted.control(name, verb)}").returncode == 0


def begin(mounted: Mounted, verb: str, name: str = "d", keys: str = "") -> None:
    """Start a job, wait until it has done something, and hold it up then."""
    command(mounted, verb, f"start speed={SOON} {keys}", name=name)
    assert mounted.job(name, verb)["resumes"] == "yes"
    wait_for("progress", lambda: int(mounted.job(name, verb)["offset"]) >= MIB // 2)
    command(mounted, verb, f"speed={SLOW}", name=name)


def end(mounted: Mounted, how: str) -> None:
    if how == "umount":
        mounted.umount()
    else:
        os.kill(mounted.pid, getattr(signal, how))
    wait_for_end(mounted.process)


def finish(mounted: Mounted, verb: str, name: str = "d") -> None:
    """Let a job that goes on come to its end at full speed."""
    if mounted.job(name, verb)["state"] == "running":
        shell(f"echo speed=0 > {mounted.control(name, verb)}")
    assert mounted.job_ended(name, verb)["state"] == "completed"


def log_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("verb", ["stream", "commit"])
def test_a_job_goes_on_by_itself(mount: Mounts, image: Image, verb: str, how: str, tmp_path: Path) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, verb)
    command(mounted, verb, "speed=2k")
    end(mounted, how)
    assert image.journal.exists()
    image.verify(killed=how == "SIGKILL")
    mounted = mount("-o", f"log={tmp_path}/log", f"d={image.path}", point=mounted.point)
    facts = mounted.job("d", verb)
    assert (facts["state"], facts["speed"], facts["resumes"]) == ("running", "2048", "yes")
    assert mounted.control("d", "error").read_text() == ""
    assert f"{image.journal}: the {verb} job goes on\n" in log_of(tmp_path / "log")
    assert mounted.flat("d").read_bytes() == image.model
    finish(mounted, verb)
    # the file may be gone before that is durable
    wait_for("the end of the journal", lambda: mounted.job("d", verb)["resumes"] == "no")
    assert not image.journal.exists()
    mounted.umount()
    wait_for_end(mounted.process)
    image.verify(killed=how == "SIGKILL")
    if verb == "stream":
        assert image.is_streamed()
    else:
        assert image.base.read_bytes() == image.model
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert mounted.job("d", verb)["state"] == "none"


@pytest.mark.parametrize("letter", ["n", "ä"])
@pytest.mark.parametrize("verb", ["stream", "commit"])
def test_a_job_goes_on_whatever_the_length_of_its_image_s_name(
    mount: Mounts, image: Image, verb: str, letter: str, tmp_path: Path
) -> None:
    name = letter * (255 // len(letter.encode()))
    image.path = image.path.rename(image.path.with_name(name))
    mounted = mount(f"d={image.path}")
    begin(mounted, verb)
    # steered too, which writes the journal anew
    command(mounted, verb, "speed=2M", "pause")
    assert mounted.job("d", verb)["resumes"] == "yes"
    end(mounted, "SIGKILL")
    assert Path(derived_name(str(image.path), SUFFIX)).exists()
    mounted = mount("-o", f"log={tmp_path}/log", f"d={image.path}", point=mounted.point)
    facts = mounted.job("d", verb)
    assert (facts["state"], facts["speed"], facts["resumes"]) == ("paused", str(2 * MIB), "yes")
    command(mounted, verb, "resume")
    finish(mounted, verb)
    mounted.umount()
    wait_for_end(mounted.process)
    assert {path.name for path in image.path.parent.iterdir()} == {name, image.base.name, "d.flat"}
    assert_clean(image.path)
    flat = image.base.with_name("flat")
    ok(qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, flat))
    assert flat.read_bytes() == image.model


@pytest.mark.parametrize("verb", ["stream", "commit"])
def test_killed_again_and_again_it_comes_to_its_end(mount: Mounts, image: Image, verb: str) -> None:
    mounted = mount(f"d={image.path}")
    command(mounted, verb, "start speed=1M")
    for _ in range(12):
        # wherever it is: the more has been copied before, the further it gets
        before = int(mounted.job("d", verb)["offset"])
        wait_for(
            "progress",
            lambda mounted=mounted, before=before: (  # type: ignore[misc]
                int(mounted.job("d", verb)["offset"]) > before or mounted.job("d", verb)["state"] == "completed"
            ),
        )
        os.kill(mounted.pid, signal.SIGKILL)
        wait_for_end(mounted.process)
        image.verify(killed=True)
        mounted = mount(f"d={image.path}", point=mounted.point)
        if mounted.job("d", verb)["state"] == "none":
            break
        # it may have come to its end already
        shell(f"echo speed=20M > {mounted.control('d', verb)}")
        assert mounted.flat("d").read_bytes() == image.model
    if mounted.job("d", verb)["state"] != "none":
        finish(mounted, verb)
    mounted.umount()
    wait_for_end(mounted.process)
    assert not image.journal.exists()
    image.verify(killed=True)
    assert image.is_streamed() if verb == "stream" else image.base.read_bytes() == image.model


@pytest.mark.parametrize("how", ["umount", "SIGKILL"])
@pytest.mark.parametrize("verb", ["stream", "commit"])
def test_a_paused_job_stays_paused(mount: Mounts, image: Image, verb: str, how: str) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, verb)
    command(mounted, verb, "pause")
    end(mounted, how)
    before = image.path.read_bytes(), image.base.read_bytes()
    mounted = mount("-o", "no-copy-on-read", f"d={image.path}", point=mounted.point)
    facts = mounted.job("d", verb)
    assert (facts["state"], facts["offset"], facts["resumes"]) == ("paused", "0", "yes")
    assert shell(f"echo remove d > {mounted.point}/.cowfs/control").returncode != 0
    end(mounted, how)
    assert (image.base.read_bytes()) == before[1]
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert mounted.job("d", verb)["state"] == "paused"
    command(mounted, verb, "resume")
    finish(mounted, verb)
    mounted.umount()
    wait_for_end(mounted.process)
    image.verify(killed=how == "SIGKILL")


def test_a_cancelled_job_does_not_go_on(mount: Mounts, image: Image) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "stream")
    command(mounted, "stream", "cancel")
    # the command has returned, so this is a promise
    os.kill(mounted.pid, signal.SIGKILL)
    wait_for_end(mounted.process)
    assert not image.journal.exists()
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert mounted.job("d", "stream")["state"] == "none"


@pytest.mark.parametrize("options", ["no-resume-jobs", "ro", "resume-jobs,no-resume-jobs"])
def test_the_option_leaves_the_journal_for_a_later_mount(
    mount: Mounts, image: Image, options: str, tmp_path: Path
) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "commit")
    end(mounted, "SIGKILL")
    kept = image.journal.read_bytes()
    mounted = mount("-o", f"{options},log={tmp_path}/log", f"d={image.path}", point=mounted.point)
    assert mounted.job("d", "commit")["state"] == "none"
    assert mounted.flat("d").read_bytes() == image.model
    reason = "the disk can only be read" if options == "ro" else "jobs are not to be resumed"
    assert f"WARNING: {image.journal}: the commit job that was broken off does not go on, since {reason}\n" in log_of(
        tmp_path / "log"
    )
    end(mounted, "umount")
    assert image.journal.read_bytes() == kept
    mounted = mount(f"d={image.path}", point=mounted.point)
    finish(mounted, "commit")
    end(mounted, "umount")
    image.verify(killed=True)


def test_another_job_takes_the_place_of_one_that_was_not_resumed(mount: Mounts, image: Image) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "commit")
    end(mounted, "SIGKILL")
    mounted = mount("-o", "no-resume-jobs", f"d={image.path}", point=mounted.point)
    begin(mounted, "stream")
    end(mounted, "SIGKILL")
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert (mounted.job("d", "commit")["state"], mounted.job("d", "stream")["state"]) == ("none", "running")
    finish(mounted, "stream")


def test_a_snapshot_ends_what_was_not_resumed(mount: Mounts, image: Image) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "commit")
    end(mounted, "SIGKILL")
    mounted = mount("-o", "no-resume-jobs", f"d={image.path}", point=mounted.point)
    command(mounted, "snapshot", "create new.qcow2")
    assert not image.journal.exists()


def test_a_damaged_journal_keeps_no_disk_from_being_served(mount: Mounts, image: Image, tmp_path: Path) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "stream")
    end(mounted, "SIGKILL")
    damaged = bytearray(image.journal.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    image.journal.write_bytes(damaged)
    mounted = mount("-o", f"log={tmp_path}/log", f"d={image.path}", point=mounted.point)
    assert mounted.job("d", "stream")["state"] == "none"
    sentence = f"no job of an earlier mount goes on: {image.journal}: is damaged\n"
    assert mounted.control("d", "error").read_text() == sentence
    assert mounted.status()["images"][0]["error"] == sentence.strip()
    assert f"WARNING: d: {sentence}" in log_of(tmp_path / "log")
    assert mounted.flat("d").read_bytes() == image.model
    assert image.journal.read_bytes() == damaged
    command(mounted, "stream", "start")
    finish(mounted, "stream")
    wait_for("the end of the journal", lambda: not image.journal.exists())


def test_a_chain_that_has_changed_is_left_alone(mount: Mounts, image: Image, tmp_path: Path) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "commit")
    end(mounted, "SIGKILL")
    other = image.base.with_name("other.raw")
    other.write_bytes(image.base.read_bytes())
    ok(qemu_img("rebase", "-u", "-f", "qcow2", "-b", other, "-F", "raw", image.path))
    before = other.read_bytes()
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert mounted.job("d", "commit")["state"] == "none"
    assert "the chain is not the one any more" in mounted.control("d", "error").read_text()
    assert not image.journal.exists()
    end(mounted, "umount")
    assert other.read_bytes() == before


def test_all_disks_of_a_mount_go_on(mount: Mounts, tmp_path: Path) -> None:
    images = [Image(tmp_path / "images", name) for name in ("a", "b", "c", "idle")]
    verbs = {"a": "stream", "b": "commit", "c": "stream"}
    words = [f"{image.name}={image.path}" for image in images]
    mounted = mount(*words)
    for name, verb in verbs.items():
        begin(mounted, verb, name)
    command(mounted, "stream", "pause", name="c")
    end(mounted, "SIGKILL")
    mounted = mount(*words[:2], words[3], point=mounted.point)
    assert shell(f"echo add {words[2]} > {mounted.point}/.cowfs/control").returncode == 0
    assert [mounted.job(name, verb)["state"] for name, verb in verbs.items()] == ["running", "running", "paused"]
    assert {mounted.job("idle", verb)["state"] for verb in ("stream", "commit")} == {"none"}
    command(mounted, "stream", "resume", name="c")
    for name, verb in verbs.items():
        finish(mounted, verb, name)
    for image in images:
        assert mounted.flat(image.name).read_bytes() == image.model
    end(mounted, "umount")
    for image in images:
        image.verify(killed=True)
        assert not image.journal.exists()


def test_a_base_that_another_disk_uses_by_now_is_left_alone(mount: Mounts, image: Image, tmp_path: Path) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "commit")
    command(mounted, "commit", "pause")
    end(mounted, "SIGKILL")
    other = tmp_path / "other.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", image.base, "-F", "raw", other))
    mounted = mount(f"d={image.path}", other, point=mounted.point)
    assert mounted.job("d", "commit")["state"] == "none"
    assert f"its backing file {image.base} is in use by 'other'" in mounted.control("d", "error").read_text()
    assert image.journal.exists()
    end(mounted, "umount")
    # and the other way round, also while the job does nothing
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert mounted.job("d", "commit")["state"] == "paused"
    assert shell(f"echo add {other} > {mounted.point}/.cowfs/control").returncode != 0
    assert "is part of the disk 'd'" in (mounted.point / ".cowfs" / "error").read_text()
    command(mounted, "commit", "cancel")
    assert shell(f"echo add {other} > {mounted.point}/.cowfs/control").returncode == 0


@pytest.fixture
def device(image: Image) -> Iterator[Path]:
    """The overlay on a block device."""
    os.truncate(image.path, 4 * SIZE)
    name = subprocess.run(
        ["losetup", "--find", "--show", str(image.path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "-d", name], check=True)


@pytest.mark.needs("loop", "losetup")
def test_a_block_device_has_no_journal_and_says_so(device: Path, mount: Mounts, image: Image, tmp_path: Path) -> None:
    mounted = mount("-o", f"log={tmp_path}/log,format=qcow2", f"d={device}")
    command(mounted, "stream", f"start speed={SLOW}")
    assert mounted.job("d", "stream")["resumes"] == "no"
    facts: dict[str, Any] = mounted.status()["images"][0]["jobs"]["stream"]
    assert (facts["state"], facts["resumes"]) == ("running", "no")
    assert f"WARNING: the stream job will not go on after a restart: {device}: is no regular file" in log_of(
        tmp_path / "log"
    )
    assert not Path(f"{device}.cowfs-job").exists()
    finish(mounted, "stream")
    assert mounted.flat("d").read_bytes() == image.model
    end(mounted, "umount")


class Deep(Image):
    """A chain of four: an active layer, two below it, a base; each has something of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "d")
        self.layers = [self.base, self.path]
        for number, name in ((1, "m"), (2, "n")):
            above = directory / f"{name}.qcow2"
            ok(qemu_img("create", "-q", "-f", "qcow2", "-b", self.path, "-F", "qcow2", above))
            qemu_io(above, "qcow2", *(f"write -P {100 * number + k} {k}M 900k" for k in range(number, 12, 2)))
            self.path = above
            self.layers.append(above)
        self.model = self.content()

    def chain(self) -> list[Path]:
        """What QEMU takes the chain for, deepest first."""
        facts = json.loads(ok(qemu_img("info", "--backing-chain", "--output=json", self.path)))
        return [Path(layer["filename"]).resolve() for layer in reversed(facts)]


@pytest.fixture
def deep(tmp_path: Path) -> Deep:
    return Deep(tmp_path / "images")


#: verb, keys, the layers that are left, whether those that are gone are marked
SHAPES = [
    ("stream", "base=1", (0, 1, 3), False),
    ("stream", "base=0", (0, 3), False),
    ("stream", "", (3,), False),
    ("commit", "top=2", (0, 1, 3), True),
    ("commit", "top=2 base=0", (0, 3), True),
    ("commit", "top=1", (0, 2, 3), True),
    ("commit", "base=0", (0, 3), True),
    ("commit", "", (0, 1, 2, 3), False),
]


def is_marked(image: Path) -> bool:
    return "was merged into" in cowfs("info", "--backing-chain", image).stderr


@pytest.mark.parametrize(("verb", "keys", "left", "marks"), SHAPES)
def test_a_job_on_a_part_of_the_chain_goes_on(
    mount: Mounts, deep: Deep, verb: str, keys: str, left: tuple[int, ...], marks: bool
) -> None:
    mounted = mount("-o", "no-copy-on-read", f"d={deep.path}")
    command(mounted, verb, f"start speed=64k {keys}")
    end(mounted, "SIGKILL")
    kept = deep.journal.read_bytes()
    deep.verify(killed=True)
    mounted = mount("-o", "no-copy-on-read", f"d={deep.path}", point=mounted.point)
    assert mounted.job("d", verb)["state"] == "running"
    finish(mounted, verb)
    wait_for("the end of the journal", lambda: not deep.journal.exists())
    assert mounted.flat("d").read_bytes() == deep.model
    end(mounted, "umount")
    deep.verify(killed=True)
    assert deep.chain() == [deep.layers[number] for number in left]
    assert [is_marked(deep.layers[k]) for k in range(4) if k not in left] == [marks] * (4 - len(left))
    # the server was killed when all was done, and only the journal was still there
    deep.journal.write_bytes(kept)
    mounted = mount("-o", "no-copy-on-read", f"d={deep.path}", point=mounted.point)
    if mounted.job("d", verb)["state"] != "none":
        finish(mounted, verb)
    assert mounted.control("d", "error").read_text() == ""
    wait_for("the end of the journal", lambda: not deep.journal.exists())
    end(mounted, "umount")
    deep.verify(killed=True)
    assert deep.chain() == [deep.layers[number] for number in left]
    assert [is_marked(deep.layers[k]) for k in range(4) if k not in left] == [marks] * (4 - len(left))


@pytest.mark.parametrize("keys", ["top=2 base=0", "base=0", "base=0 pivot=wait"])
def test_what_was_merged_before_a_crash_is_marked_after_it(mount: Mounts, deep: Deep, keys: str) -> None:
    mounted = mount("-o", "no-copy-on-read", f"d={deep.path}")
    command(mounted, "commit", f"start speed=64k {keys}")
    kept = None if "wait" in keys else deep.journal.read_bytes()
    if kept is None:
        command(mounted, "commit", "speed=0")
        wait_for("ready", lambda: mounted.job("d", "commit")["state"] == "ready")
        kept = deep.journal.read_bytes()
        end(mounted, "SIGKILL")
    else:
        finish(mounted, "commit")
        end(mounted, "umount")
    middle = deep.layers[1:3]
    # as if the crash had come between the header that was changed and the marks
    for image, below, format in zip(middle, deep.layers, ("raw", "qcow2"), strict=False):
        assert is_marked(image)
        ok(qemu_img("rebase", "-u", "-f", "qcow2", "-b", below, "-F", format, image))
    deep.journal.write_bytes(kept)
    mounted = mount("-o", "no-copy-on-read", f"d={deep.path}", point=mounted.point)
    assert [is_marked(image) for image in middle] == [True, True]
    if "wait" in keys:
        wait_for("ready", lambda: mounted.job("d", "commit")["state"] == "ready")
        command(mounted, "commit", "complete")
        assert mounted.job_ended("d", "commit")["state"] == "completed"
        end(mounted, "umount")
        assert is_marked(deep.path)
        assert deep.base.read_bytes() == deep.model
        assert not deep.journal.exists()
    elif "top" not in keys:
        finish(mounted, "commit")
        end(mounted, "umount")
        deep.verify(killed=True)


@pytest.mark.parametrize("how", ["umount", "SIGKILL"])
def test_a_pivot_that_waits_waits_again(mount: Mounts, deep: Deep, how: str) -> None:
    mounted = mount(f"d={deep.path}")
    command(mounted, "commit", "start pivot=wait base=1")
    wait_for("ready", lambda: mounted.job("d", "commit")["state"] == "ready")
    written = os.urandom(MIB)
    with mounted.flat("d").open("r+b", buffering=0) as file:
        file.write(written)
        os.fsync(file.fileno())
    deep.model = written + deep.model[MIB:]
    end(mounted, how)
    deep.verify(killed=True)
    mounted = mount(f"d={deep.path}", point=mounted.point)
    wait_for("ready", lambda: mounted.job("d", "commit")["state"] == "ready")
    assert mounted.flat("d").read_bytes() == deep.model
    command(mounted, "commit", "complete")
    assert mounted.job_ended("d", "commit")["state"] == "completed"
    wait_for("the end of the journal", lambda: not deep.journal.exists())
    assert mounted.control("d", "chain").read_text().splitlines()[0].endswith(str(deep.layers[1]))
    assert mounted.flat("d").read_bytes() == deep.model
    end(mounted, "umount")
    deep.path = deep.layers[1]
    deep.verify(killed=True)


@pytest.mark.parametrize("verb", ["stream", "commit"])
def test_a_job_that_was_finished_without_a_mount_does_not_go_on(mount: Mounts, image: Image, verb: str) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, verb)
    end(mounted, "SIGKILL")
    other = "commit" if verb == "stream" else "stream"
    assert image.journal.exists()
    ok(cowfs(verb, image.path))
    assert not image.journal.exists()
    mounted = mount(f"d={image.path}", point=mounted.point)
    assert {mounted.job("d", name)["state"] for name in (verb, other)} == {"none"}
    end(mounted, "umount")
    image.verify(killed=True)


def test_another_job_without_a_mount_leaves_the_journal(mount: Mounts, image: Image) -> None:
    mounted = mount(f"d={image.path}")
    begin(mounted, "stream")
    end(mounted, "SIGKILL")
    ok(cowfs("commit", image.path))
    assert image.journal.exists()
    image.journal.write_bytes(b"damaged")
    ok(cowfs("commit", image.path))
    assert image.journal.read_bytes() == b"damaged"

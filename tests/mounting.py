"""Real mounts, in a process of their own, as a user makes them."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Self

from commandline import PATIENCE, cowfs, ok


def wait_for(what: str, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Look again and again until ``condition`` holds; fails after ``patience`` seconds."""
    end = monotonic() + patience
    while not condition():
        assert monotonic() < end, f"waited {patience} seconds for: {what}"
        select.select([], [], [], 0.01)


def wait_for_end(process: int) -> None:
    """Wait until a process, by its pidfd, has ended."""
    assert select.select([process], [], [], PATIENCE)[0], "the server did not end"


def shell(command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell."""
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=cwd, timeout=PATIENCE, check=False
    )


class Mounted:
    """A mount, and the files of it."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self.pid: int = self.status()["pid"]
        self.process = os.pidfd_open(self.pid)

    def flat(self, name: str) -> Path:
        return self.point / name

    def control(self, name: str, file: str) -> Path:
        return self.point / ".cowfs" / name / file

    def status(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.point / ".cowfs" / "status.json").read_text())
        return facts

    def job(self, name: str, verb: str) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in self.control(name, verb).read_text().splitlines())

    def job_ended(self, name: str, verb: str) -> dict[str, str]:
        """Wait until a job is over; its figures."""
        wait_for(f"the end of the {verb} job", lambda: self.job(name, verb)["state"] not in ("running", "paused"))
        return self.job(name, verb)

    def umount(self) -> None:
        ok(cowfs("umount", self.point))


class Mounts:
    """Makes mounts, and takes away what a test leaves behind of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: list[Mounted] = []
        self._points: list[Path] = []

    def new_point(self) -> Path:
        point = self._directory / f"mount{len(self._points)}"
        point.mkdir()
        self._points.append(point)
        return point

    def __call__(self, *words: str | Path, point: Path | None = None, prefix: Sequence[str] = ()) -> Mounted:
        """``cowfs mount WORDS… POINT``, behind ``prefix``."""
        point = point or self.new_point()
        assert ok(cowfs("mount", *words, point, prefix=prefix)) == ""
        self._made.append(Mounted(point))
        return self._made[-1]

    def clean_up(self) -> None:
        for point in self._points:
            while subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False).returncode == 0:
                pass
        stuck = []
        for mounted in self._made:
            if not select.select([mounted.process], [], [], PATIENCE)[0]:
                stuck.append(mounted.pid)
                signal.pidfd_send_signal(mounted.process, signal.SIGKILL)
            os.close(mounted.process)
        assert not stuck, f"servers that did not end, and were killed: {stuck}"


class Namespace:
    """A mount namespace of its own, for what a test must not do to this machine; everything in it goes with it.

    ``prepare`` is what a shell does in it first, in ``directory``. Commands run there behind ``prefix``.
    """

    def __init__(self, directory: Path, prepare: str) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", f"set -e\n{prepare}\necho ready\nread -r end"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.prefix = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        self._directory = directory

    def __enter__(self) -> Self:
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        # servers of mounts that a test left behind hold the namespace, and end with their mounts
        mounts = Path(f"/proc/{self._holder.pid}/mountinfo").read_text().splitlines()
        for point in (line.split(" ")[4] for line in reversed(mounts) if " fuse.cowfs " in line):
            if Path(point).is_relative_to(self._directory):
                subprocess.run([*self.prefix, "umount", "-l", point], capture_output=True, check=False)
        self._holder.communicate(b"end\n")

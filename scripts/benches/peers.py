"""Servers that show an image as a flat file, and fio runs on what they show."""

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: seconds that a server may take to show its file
PATIENCE = 20.0


def run(*words: str | Path, text: str | None = None) -> str:
    """Run a command that must succeed, with ``text`` on its standard input; what it prints."""
    command = [str(word) for word in words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: {' '.join(map(str, words))}: {done.stderr or done.stdout}")
    return done.stdout


class Peer(ABC):
    """One way to show an image as a file."""

    name: str
    #: what its server's command begins with
    prefix: tuple[str, ...] = ()

    @contextmanager
    def serving(self, image: Path, format: str, folder: Path) -> Iterator[Path]:
        """Show an image; yields the path of the flat file."""
        flat = self.start(image, format, folder)
        try:
            yield flat
        finally:
            self.stop(folder)

    @abstractmethod
    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Begin to serve."""

    @abstractmethod
    def stop(self, folder: Path) -> None:
        """Flush, and return when the server has exited."""


class Cowfs(Peer):
    """The work tree's own; ``options`` are those of the mount."""

    name = "cowfs"

    def __init__(self, options: str = "") -> None:
        self._options = options

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Mount."""
        point = folder / "cowfs"
        point.mkdir(exist_ok=True)
        options = ",".join(filter(None, (f"format={format}", self._options)))
        run(*self.prefix, Path(sys.executable).with_name("cowfs"), "mount", "-o", options, f"disk={image}", point)
        return point / "disk"

    def stop(self, folder: Path) -> None:
        """Unmount."""
        run(Path(sys.executable).with_name("cowfs"), "umount", folder / "cowfs")


class QemuExport(Peer):
    """QEMU's FUSE export, from ``qemu-storage-daemon``."""

    name = "qemu"

    def __init__(self, *, copy_on_read: bool = False) -> None:
        self._copy_on_read = copy_on_read

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Export, growing writes allowed as the format needs them."""
        flat = folder / "qemu"
        flat.touch()
        before = flat.stat().st_dev
        node = "copying" if self._copy_on_read else "disk"
        self._process = subprocess.Popen(
            [
                *self.prefix,
                "qemu-storage-daemon",
                "--blockdev",
                f"driver=file,node-name=file,filename={image}",
                "--blockdev",
                f"driver={format},node-name=disk,file=file",
                *(("--blockdev", "driver=copy-on-read,node-name=copying,file=disk") if self._copy_on_read else ()),
                "--export",
                f"type=fuse,id=export,node-name={node},mountpoint={flat},writable=on",
            ]
        )
        deadline = time.monotonic() + PATIENCE
        while flat.stat().st_dev == before:
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit("bench: qemu-storage-daemon did not start")
            time.sleep(0.02)
        return flat

    def stop(self, folder: Path) -> None:
        """SIGTERM ends the export in order."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=PATIENCE)


def fio(flat: Path, *options: str) -> float:
    """Operations a second of one fio job, direct and asynchronous."""
    job = fio_job(flat, *options)
    return float(job["read"]["iops"] + job["write"]["iops"])


def fio_job(flat: Path, *options: str) -> dict[str, Any]:
    """All that fio has to say of such a job."""
    text = run(
        "fio",
        "--name=bench",
        f"--filename={flat}",
        "--direct=1",
        "--ioengine=libaio",
        "--output-format=json",
        *options,
    )
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        sys.exit(f"bench: fio failed on {flat}: error {job['error']}")
    return job


def check(image: Path, format: str) -> None:
    """Ask QEMU whether the image is sound."""
    done = subprocess.run(
        ["qemu-img", "check", "-q", "-f", format, str(image)], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):
        sys.exit(f"bench: {image} is damaged: {done.stdout}{done.stderr}")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cores": os.cpu_count(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "qemu": run("qemu-img", "--version").split()[2],
        "load": os.getloadavg()[0],
    }

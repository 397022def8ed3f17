"""Servers with a stream at work on what they serve, and what guests feel of it."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from peers import PATIENCE, Cowfs, Peer, check, fio_job, run


class Streamer(Protocol):
    """A peer that copies what lies in the backing file into the image meanwhile."""

    name: str

    def serving(self, image: Path, format: str, folder: Path) -> AbstractContextManager[Path]:
        """As `Peer.serving`."""

    def start_stream(self) -> None:
        """Begin."""

    def streamed(self) -> int | None:
        """How far it is, in bytes of the disk; None when it has ended, which has to be well."""

    def finish(self) -> None:
        """Wait until it has ended, without asking all the time."""


class CowfsStream(Cowfs):
    """The work tree's own, steered by its control files."""

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Mount."""
        flat = super().start(image, format, folder)
        self._stream = flat.parent / ".cowfs/disk/stream"
        return flat

    def start_stream(self) -> None:
        """Write the command."""
        try:
            self._stream.write_text("start")
        except OSError:
            sys.exit(f"bench: {self._stream.with_name('error').read_text()}")

    def streamed(self) -> int | None:
        """Read the job file."""
        facts = dict(line.split(": ", 1) for line in self._stream.read_text().splitlines() if ": " in line)
        if facts["state"] == "completed":
            return None
        if facts["state"] != "running":
            sys.exit(f"bench: the stream has {facts['state']}: {facts.get('error')}")
        return int(facts["offset"])

    def finish(self) -> None:
        """The job file can be waited on: it was read, and its state changes."""
        with self._stream.open() as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while self.streamed() is not None:
                file.seek(0)
                if "state: running" in file.read():
                    poll.poll()


class QemuStream(Peer):
    """QEMU's FUSE export, with block-stream at work on the image.

    A writable FUSE export does not let block-stream start: each wants to be the only one to change the disk's size. So
    reads go to a read-only export, and where there are ``writes`` the export shows what a second daemon, which
    has the image and the job, serves over a socket.
    """

    name = "qemu"

    def __init__(self, *, writes: bool) -> None:
        self._writes = writes

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Export, and connect to the monitor of whoever has the image."""
        self._daemons: list[subprocess.Popen[bytes]] = []
        monitor = folder / "monitor"
        words = [*_disk(image, format), "--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off"]
        words += ["--monitor", "chardev=monitor"]
        if self._writes:
            path = folder / "nbd"
            words += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
            words += ["--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"]
            _await(path.exists, self._daemon(*words))
            client = f"driver=nbd,node-name=disk,server.type=unix,server.path={path},export=disk"
            flat = self._export(folder, "--blockdev", client)
        else:
            flat = self._export(folder, *words, writable=False)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(monitor))
        self._answers = self._socket.makefile()
        self._answers.readline()
        self._ask("qmp_capabilities")
        return flat

    def _export(self, folder: Path, *words: str, writable: bool = True) -> Path:
        flat = folder / "qemu"
        flat.touch()
        before = flat.stat().st_dev
        export = f"type=fuse,id=export,node-name=disk,mountpoint={flat},writable={'on' if writable else 'off'}"
        process = self._daemon(*words, "--export", export)
        _await(lambda: flat.stat().st_dev != before, process)
        return flat

    def _daemon(self, *words: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(["qemu-storage-daemon", *words])
        self._daemons.append(process)
        return process

    def stop(self, folder: Path) -> None:
        """Who shows the disk goes before who serves it."""
        self._answers.close()
        self._socket.close()
        for process in reversed(self._daemons):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=PATIENCE)
        for name in ("monitor", "nbd"):
            (folder / name).unlink(missing_ok=True)

    def _ask(self, command: str, **arguments: object) -> Any:
        """Give a command on the monitor; events that come in between are not looked at."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._answers.readline())):
            if "error" in answer:
                sys.exit(f"bench: {command}: {answer['error']['desc']}")
        return answer["return"]

    def start_stream(self) -> None:
        """Begin a job that stays when it has ended, so that it can be told how."""
        self._ask("block-stream", **{"job-id": "stream", "device": "disk", "auto-dismiss": False})

    def streamed(self) -> int | None:
        """Ask for the job."""
        job = self._ask("query-jobs")[0]
        if job["status"] != "concluded":
            return int(job["current-progress"])
        if "error" in job:
            sys.exit(f"bench: block-stream: {job['error']}")
        return None

    def finish(self) -> None:
        """A job that ends says so; nothing has been asked since it began."""
        while '"concluded"' not in self._answers.readline():
            pass
        self.streamed()


def _disk(image: Path, format: str) -> list[str]:
    """Options for an image, and what its header says lies below it."""
    storage, disk = f"driver=file,node-name=file,filename={image}", f"driver={format},node-name=disk,file=file"
    return ["--blockdev", storage, "--blockdev", disk]


def _await(is_there: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("bench: qemu-storage-daemon did not start")
        time.sleep(0.02)


def streamed(peer: Streamer, image: Path, base: Path) -> float:
    """Bytes a second of a stream of all of ``base`` into an empty overlay, which is looked at, and removed then."""
    with peer.serving(image, "qcow2", image.parent):
        start = time.monotonic()
        peer.start_stream()
        peer.finish()
        sync(image)
        elapsed = time.monotonic() - start
    check(image, "qcow2")
    run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", image, base)
    remove(image)
    return base.stat().st_size / elapsed


def sync(path: Path) -> None:
    """Make a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove(image: Path) -> None:
    """Remove an image, with the journal of a job that was still at work, which would go on with the next one."""
    for file in image.parent.glob(f"{image.name}*"):
        file.unlink()


class Latencies(NamedTuple):
    """Of one fio job: operations a second, and microseconds that half and 99 of 100 of them took at most."""

    iops: float
    p50: float
    p99: float


def fio_latencies(flat: Path, *options: str) -> Latencies:
    """Figures of one fio job, its reads and writes taken together."""
    mixed = fio_job(flat, "--unified_rw_reporting=1", *options)["mixed"]
    percentiles = mixed["clat_ns"]["percentile"]
    return Latencies(mixed["iops"], percentiles["50.000000"] / 1000, percentiles["99.000000"] / 1000)

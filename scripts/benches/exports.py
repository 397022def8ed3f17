"""More servers that show an image as a flat file, beside those of peers.py, and what to compare all of them with.

What is said of each goes into the output: nobody has to guess how the others were set up.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from peers import PATIENCE, Cowfs, Peer, QemuExport, run

#: how each is set up, for the output; all images lie in memory, and all go through the host's page cache
SETTINGS = {
    "cowfs": "cowfs mount, as it is by default: writeback cache, read-ahead 1 MiB; copy-on-read off where not told",
    "qemu": "qemu-storage-daemon, FUSE export, writable=on, cache.direct=off, aio=threads, L2 cache 32 MiB (default)",
    "nbd": "qemu-nbd --cache=writeback --aio=threads --shared=8, over a Unix socket to nbdfuse with 4 connections",
    "floor": "passthrough.c, libfuse, several threads, a raw file of the same content",
    "raw": "the same raw file without any FUSE",
}


class Nbd(Peer):
    """``qemu-nbd``, shown as a file by ``nbdfuse``."""

    name = "nbd"

    def __init__(self, *, copy_on_read: bool = False) -> None:
        self._copy_on_read = copy_on_read

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Serve on a socket, and show what is there."""
        point, address = folder / "nbd", folder / "nbd.socket"
        point.mkdir(exist_ok=True)
        server = ["qemu-nbd", "--cache=writeback", "--aio=threads", "--shared=8", "--persistent", f"--socket={address}"]
        if self._copy_on_read:
            below = f"file.driver={format},file.file.driver=file,file.file.filename={image}"
            server += ["--image-opts", f"driver=copy-on-read,{below}"]
        else:
            server += ["-f", format, str(image)]
        self._server = subprocess.Popen(server)
        await_file(address, self._server)
        self._shower = subprocess.Popen(["nbdfuse", "-C", "4", f"{point}/disk", f"nbd+unix:///?socket={address}"])
        await_file(point / "disk", self._shower)
        return point / "disk"

    def stop(self, folder: Path) -> None:
        """Unmount, which ends nbdfuse; then SIGTERM has qemu-nbd flush and end."""
        run("fusermount3", "-u", folder / "nbd")
        self._shower.wait(timeout=PATIENCE)
        self._server.send_signal(signal.SIGTERM)
        self._server.wait(timeout=PATIENCE)
        (folder / "nbd.socket").unlink(missing_ok=True)


class Floor(Peer):
    """The C passthrough, compiled on the spot; it serves raw files alone."""

    name = "floor"

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Compile it if that has not been done, and start it."""
        program = folder / "passthrough"
        if not program.exists():
            flags = run("pkg-config", "--cflags", "--libs", "fuse3").split()
            run("gcc", "-O2", "-o", program, Path(__file__).with_name("passthrough.c"), *flags)
        point = folder / "floor"
        point.mkdir(exist_ok=True)
        self._process = subprocess.Popen([str(program), str(image), str(point)])
        await_file(point / "disk", self._process)
        return point / "disk"

    def stop(self, folder: Path) -> None:
        """SIGTERM unmounts."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=PATIENCE)


class Raw(Peer):
    """No server at all."""

    name = "raw"

    def start(self, image: Path, format: str, folder: Path) -> Path:
        """Return the file itself."""
        return image

    def stop(self, folder: Path) -> None:
        """Nothing to stop."""


#: names of those that serve any format, and of those that only do raw files
SERVERS = ("cowfs", "qemu", "nbd")
BOUNDS = ("floor", "raw")


def peers_named(names: tuple[str, ...], *, copy_on_read: bool = False) -> list[Peer]:
    """Make what serves, in this order."""
    makers = {
        "cowfs": lambda: Cowfs("" if copy_on_read else "no-copy-on-read"),
        "qemu": lambda: QemuExport(copy_on_read=copy_on_read),
        "nbd": lambda: Nbd(copy_on_read=copy_on_read),
        "floor": Floor,
        "raw": Raw,
    }
    return [makers[name]() for name in names]


def lacking(names: tuple[str, ...]) -> list[str]:
    """Debian packages that these need and that are not there."""
    needs = {
        "qemu": {"qemu-storage-daemon": "qemu-system-common"},
        "nbd": {"nbdfuse": "libnbd-bin", "qemu-nbd": "qemu-utils"},
        "floor": {"gcc": "gcc", "pkg-config": "pkg-config"},
    }
    wanted = {"fio": "fio", **{tool: package for name in names for tool, package in needs.get(name, {}).items()}}
    return sorted({package for tool, package in wanted.items() if shutil.which(tool) is None})


def await_file(flat: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a server shows its file."""
    deadline = time.monotonic() + PATIENCE
    while not flat.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"bench: {process.args[0]} did not start")
        time.sleep(0.002)


def serving_processes(image: Path) -> list[int]:
    """Return the processes that have an image's name in their command line, but for our own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                # it has ended meanwhile
                continue
            if os.fsencode(image) in words:
                found.append(int(entry.name))
    return found


def memory(image: Path) -> float:
    """MiB that the servers of an image take, shared pages divided among those who share them (Pss)."""
    total = 0
    for pid in serving_processes(image):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024

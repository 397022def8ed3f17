"""A slow host for a server: what it asks of files takes its time, is held at a gate, or is done in part.

``slowhost.c`` is loaded into the server, and does what stands in a file that both have in memory.
"""

import mmap
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mounting import wait_for

#: of ``struct host`` and ``struct kind``
_SEED = struct.Struct("Q")
_KIND = struct.Struct("QIIIIII")
_DELAY, _DECLINES, _SHORTENS, _HOLDS, _OPENED, _WAITING = range(8, 32, 4)
_ALL = (1 << 32) - 1


def build(directory: Path) -> Path:
    """Compile what is loaded into the server."""
    made = directory / "slowhost.so"
    source = Path(__file__).with_name("slowhost.c")
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True
    )
    return made


class Kind:
    """The calls of one kind, and the gate that they have to pass."""

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        self._memory = memory
        self._start = start

    def _get(self, field: int) -> int:
        return int.from_bytes(self._memory[self._start + field : self._start + field + 4], "little")

    def _set(self, field: int, value: int) -> None:
        self._memory[self._start + field : self._start + field + 4] = value.to_bytes(4, "little")

    def behaves(self, *, delay: float = 0.0, declines: float = 0.0, shortens: float = 0.0) -> None:
        """Each call takes up to ``delay`` seconds longer; of so many of each, a part is declined, or shortened."""
        self._set(_DELAY, int(delay * 1e6))
        self._set(_DECLINES, int(declines * 65536))
        self._set(_SHORTENS, int(shortens * 65536))

    @contextmanager
    def held(self, file: Path | None = None, calls: int = _ALL) -> Iterator[None]:
        """Close the gate for the next calls, of one file or of all, until it is opened; later ones pass."""
        self._memory[self._start : self._start + 8] = (file.stat().st_ino if file else 0).to_bytes(8, "little")
        self._set(_HOLDS, calls)
        try:
            yield
        finally:
            # who waits for what is held would wait for ever, a file that is closed too
            self.open()

    def open(self) -> None:
        """Let all calls go that the gate holds, and hold no more."""
        self._set(_HOLDS, 0)
        self._set(_OPENED, self._get(_OPENED) + 1)

    def has_arrived(self) -> None:
        """Wait until the gate holds a call."""
        wait_for("the server to come to the gate", lambda: self._get(_WAITING) > 0)


class SlowHost:
    """The host of servers that are started behind `prefix`; as fast as ever, until something is asked of it."""

    def __init__(self, library: Path, directory: Path, seed: int = 0) -> None:
        path = directory / "slow-host"
        path.write_bytes(_SEED.pack(seed).ljust(_SEED.size + 5 * _KIND.size, b"\0"))
        # servers count in it, whoever runs them
        path.chmod(0o666)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        #: what a program is to find in its environment
        self.environment = {"LD_PRELOAD": str(library), "COWFS_SLOW_HOST": str(path)}
        self.prefix = ["env", *(f"{name}={value}" for name, value in self.environment.items())]
        kinds = [Kind(self._memory, _SEED.size + number * _KIND.size) for number in range(5)]
        #: fsync and fdatasync; reads, writes; what takes or gives back space; copies in the kernel
        self.flushes, self.reads, self.writes, self.space, self.copies = self._kinds = kinds

    def is_slow(self) -> None:
        """Be as bad as a host can be: everything takes its time, memory holds little, and much is done in parts."""
        self.flushes.behaves(delay=0.04)
        self.reads.behaves(delay=0.002, declines=0.3, shortens=0.2)
        self.writes.behaves(delay=0.0005, shortens=0.2)
        self.space.behaves(delay=0.002)
        self.copies.behaves(delay=0.004, shortens=0.2)

    def open(self) -> None:
        """Open all gates."""
        for kind in self._kinds:
            kind.open()

    def close(self) -> None:
        """Let everything go on, and let go of it."""
        self.open()
        self._memory.close()

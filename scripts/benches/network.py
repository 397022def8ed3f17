"""Two hosts and the link between them: network namespaces, joined by link.c."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers import PATIENCE, run

NEAR, FAR = "10.231.79.2", "10.231.79.1"


class Hosts:
    """``near`` and ``far`` are what a command on either host begins with."""

    def __init__(self, names: Sequence[str], folder: Path, delay: float, rate: float) -> None:
        self._names = names
        self.far, self.near = (("nsenter", f"--net=/run/netns/{name}") for name in names)
        program = folder / "link"
        run("gcc", "-O2", "-o", program, Path(__file__).with_name("link.c"))
        # milliseconds of the way there and back, and Mbit/s
        words = [program, *names, str(round(delay * 500)), str(round(rate * 1e6))]
        self._link = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE)
        assert self._link.stdout is not None
        if self._link.stdout.readline() != b"ready\n":
            sys.exit("bench: there is no link")
        for name, own, other in zip(names, (FAR, NEAR), (NEAR, FAR), strict=True):
            run("ip", "-n", name, "addr", "add", own, "peer", other, "dev", "link0")
            run("ip", "-n", name, "link", "set", "lo", "up")
            # the queue that matters is the link's
            run("ip", "-n", name, "link", "set", "link0", "txqueuelen", "10000", "up")

    def stop(self) -> None:
        """End the link."""
        self._link.kill()
        self._link.wait()

    def received(self) -> int:
        """Bytes that have come out of the link at the near host, headers included."""
        facts = json.loads(run("ip", "-n", self._names[1], "-s", "-j", "link", "show", "link0"))
        return int(facts[0]["stats64"]["rx"]["bytes"])

    @contextmanager
    def serving(self, port: int, *command: str | Path) -> Iterator[None]:
        """Run a server on the far host, and wait until it takes connections."""
        # some tell of every client that goes
        words = [*self.far, *map(str, command)]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + PATIENCE
            while not run(*self.far, "ss", "-Hltn", f"sport = :{port}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"bench: {command[0]} did not start")
                time.sleep(0.02)
            yield
        finally:
            process.kill()
            process.wait()

    def rate(self, size: int) -> float:
        """Bytes a second of one plain stream of so many bytes over the link."""
        program = [sys.executable, str(Path(__file__).resolve()), str(size)]
        with self.serving(5001, *program, "send"):
            return float(run(*self.near, *program, "receive"))


@contextmanager
def two_hosts(folder: Path, delay: float, rate: float) -> Iterator[Hosts]:
    """Make hosts whose link takes ``delay`` milliseconds there and back, and ``rate`` Mbit/s; gone afterwards."""
    names = [f"cowfs-bench-{os.getpid()}-{role}" for role in ("far", "near")]
    made: list[str] = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
            made.append(name)
        hosts = Hosts(names, folder, delay, rate)
        try:
            yield hosts
        finally:
            hosts.stop()
    finally:
        for name in made:
            run("ip", "netns", "del", name)


def _send(size: int) -> None:
    with socket.create_server((FAR, 5001)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(size))


def _receive(size: int) -> None:
    start, left, buffer = time.monotonic(), size, bytearray(1 << 20)
    with socket.create_connection((FAR, 5001)) as connection:
        while left > 0:
            done = connection.recv_into(buffer)
            if not done:
                sys.exit("bench: the link has lost its stream")
            left -= done
    print(size / (time.monotonic() - start))


if __name__ == "__main__":
    {"send": _send, "receive": _receive}[sys.argv[2]](int(sys.argv[1]))

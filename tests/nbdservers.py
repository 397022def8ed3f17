"""Real NBD servers: ``qemu-nbd`` and ``nbdkit``, each behind a Unix socket of its own or on a TCP port."""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from mounting import wait_for


def free_port() -> int:
    """A TCP port of localhost that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Server:
    """A server that can be killed, frozen and started again as it was."""

    def __init__(self, command: Sequence[str], where: Path | int, export: str = "") -> None:
        self._command = command
        self._where = where
        self.export = export
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """How cowfs, QEMU and libnbd call the export."""
        if isinstance(self._where, int):
            return f"nbd://localhost:{self._where}/{quote(self.export)}"
        return f"nbd+unix:///{quote(self.export)}?socket={self._where}"

    def uri_of(self, export: str) -> str:
        """The same of another export."""
        return Server([], self._where, export).uri

    def start(self) -> None:
        """Return when it takes connections."""
        assert self._process is None
        if isinstance(self._where, Path):
            self._where.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        wait_for("the NBD server", self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the NBD server has ended"
        family = socket.AF_INET if isinstance(self._where, int) else socket.AF_UNIX
        with socket.socket(family) as probe:
            address = ("127.0.0.1", self._where) if isinstance(self._where, int) else str(self._where)
            # some take as many clients as they are told, and no more: this is one
            return probe.connect_ex(address) == 0

    def kill(self) -> None:
        """As a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections, and does nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class Servers:
    """Starts servers, and ends them all after the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[Server] = []

    def qemu(self, image: Path, *words: str, format: str = "raw", export: str = "", tcp: bool = False) -> Server:
        """``qemu-nbd``: persistent, for many clients, writable unless ``words`` say ``-r``."""
        where, options = self._place(tcp, "-k", ["-b", "127.0.0.1", "-p"])
        command = ["qemu-nbd", "-f", format, "-t", "-e", "64", "--discard=unmap", "-x", export, *options, *words]
        return self._started(Server([*command, str(image)], where, export))

    def nbdkit(self, *words: str, export: str = "", tcp: bool = False) -> Server:
        """``nbdkit`` with options, filters, and a plugin with its parameters."""
        where, options = self._place(tcp, "-U", ["-i", "127.0.0.1", "-p"])
        return self._started(Server(["nbdkit", "-f", "--exit-with-parent", *options, *words], where, export))

    def _place(self, tcp: bool, unix: str, over_tcp: list[str]) -> tuple[Path | int, list[str]]:
        if tcp:
            port = free_port()
            return port, [*over_tcp, str(port)]
        path = self._folder / f"nbd{len(self._made)}.sock"
        assert len(os.fsencode(path)) < 108
        return path, [unix, str(path)]

    def _started(self, server: Server) -> Server:
        self._made.append(server)
        server.start()
        return server

    def clean_up(self) -> None:
        for server in self._made:
            server.kill()

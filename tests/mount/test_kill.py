"""The server is killed under a guest that writes and flushes, again and again, in half of the rounds while it streams.

What an fsync acknowledged is there each time; everything else is what was there before or what the guest wrote.
``COWFS_KILLS=100 scripts/test tests/mount/test_kill.py`` makes many more rounds.
"""

import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from commandline import ok, qemu_img
from crashing import Guest
from mounting import Mounted, Mounts, shell, wait_for, wait_for_end
from powercut import SECTOR

pytestmark = pytest.mark.needs("root", "fuse", "qemu-img")

ROUNDS = int(os.environ.get("COWFS_KILLS", "6"))
SIZE = 6 << 20
#: bytes a second, so that streaming takes longer than one round
SPEED = "1M"


class Writer:
    """A guest that writes until the server is gone, with an fsync every few writes."""

    def __init__(self, flat: Path, guest: Guest, seed: int) -> None:
        self._descriptor = os.open(flat, os.O_RDWR)
        self._guest = guest
        self._chooser = random.Random(seed)
        #: fsyncs that succeeded
        self.flushes = 0
        #: why it has ended
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                for _ in range(self._chooser.randrange(1, 8)):
                    self._write()
                gone = self._guest.mark()
                os.fsync(self._descriptor)
                self.flushes += 1
                self._guest.acknowledge(gone, self.flushes)
        except OSError as error:
            self.error = error

    def _write(self) -> None:
        offset = self._chooser.randrange(SIZE // SECTOR - 80) * SECTOR
        data = self._chooser.randbytes(self._chooser.choice([1, 1, 8, 8, 9, 80]) * SECTOR)
        self._guest.note(offset, data)
        done = os.pwrite(self._descriptor, data, offset)
        assert done == len(data)

    def join(self) -> None:
        self._thread.join()
        with pytest.raises(OSError, match="not connected"):
            os.close(self._descriptor)


def assert_sound(image: Path, format: str) -> None:
    """Leaks at the most, or the mark that it was not closed."""
    found = json.loads(qemu_img("check", "-f", format, "--output=json", image).stdout)
    assert found["check-errors"] == 0
    assert not found.get("corruptions", 0), found


def content(image: Path, format: str) -> bytes:
    """What QEMU reads."""
    flat = image.with_suffix(".flat")
    ok(qemu_img("convert", "-f", format, "-O", "raw", image, flat))
    return flat.read_bytes()


def kill(mounted: Mounted, writer: Writer, flushes: int) -> None:
    """Wait for so many fsyncs, and kill the server at whatever it is doing then."""
    wait_for("the guest's fsyncs", lambda: writer.flushes >= flushes or writer.error is not None)
    assert writer.error is None
    os.kill(mounted.pid, signal.SIGKILL)
    wait_for_end(mounted.process)
    writer.join()


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_what_was_acknowledged_survives_every_kill(mount: Mounts, tmp_path: Path, format: str) -> None:
    chooser = random.Random(format)
    (tmp_path / "base.raw").write_bytes(chooser.randbytes(SIZE))
    image = tmp_path / f"overlay.{format}"
    ok(qemu_img("create", "-q", "-f", format, "-b", "base.raw", "-F", "raw", image))
    guest = Guest((tmp_path / "base.raw").read_bytes())
    point = mount.new_point()
    for number in range(ROUNDS):
        mounted = mount(f"d={image}", point=point)
        assert mounted.flat("d").read_bytes() == guest.now
        # one that was running goes on by itself
        if number % 2 and mounted.job("d", "stream")["state"] == "none":
            assert shell(f"echo start speed={SPEED} > {mounted.control('d', 'stream')}").returncode == 0
        writer = Writer(mounted.flat("d"), guest, chooser.randrange(1 << 30))
        kill(mounted, writer, chooser.randrange(1, 20))
        assert_sound(image, format)
        left = content(image, format)
        guest.verify(writer.flushes, left)
        guest = Guest(left)
    mounted = mount(f"d={image}", point=point)
    assert mounted.flat("d").read_bytes() == guest.now
    mounted.umount()
    wait_for_end(mounted.process)
    assert_sound(image, format)
    assert content(image, format) == guest.now

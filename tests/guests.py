"""Virtual machines for tests: QEMU, Debian's kernel, busybox, and a root file system made on the spot.

The usual guest writes files and their checksums until it is told to stop, looks at everything once more, and shuts
down. What it says on its serial line, one ``guest: WORD VALUE`` each, is what the host can hold its disk against.
"""

import gzip
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mounting import wait_for

#: what scripts/setup unpacked of Debian's kernel package
KERNEL = Path(__file__).parent.parent / ".guest"

#: seconds for one step of a guest, which may have no KVM and share two processors with everything else
PATIENCE = 600.0

#: bytes of the file that is in the base, of that which the guest deletes again, and of that which is nothing but zeros
IN_THE_BASE = 12 << 20
DELETED = ZEROS = 16 << 20

_DISK_SIZE = "160M"
_INITRAMFS_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in MODULES; do /bin/busybox insmod /$module; done
until [ -e /dev/vda ]; do :; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""
_INIT = """#!/bin/busybox sh
export PATH=/bin
say() { echo "guest: $*"; }
digest() { sha256sum | cut -c 1-64; }
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
{ read -r line; touch /run/stop; } </dev/console &
say before $(digest </in-the-base)
round=0
while [ ! -e /run/stop ]; do
    round=$((round + 1))
    name=/data/$((round % 16))
    head -c $(((round % 7 + 1) * 99991)) /dev/urandom >$name
    sha256sum $name >$name.sum
    [ $((round % 4)) != 0 ] || sync
    say round $round
done
dd if=/dev/urandom of=/deleted bs=1048576 count=DELETED 2>/dev/null
dd if=/dev/zero of=/zeros bs=1048576 count=ZEROS 2>/dev/null
sync
rm /deleted
sync
fstrim / && say trimmed yes || say trimmed no
echo 3 >/proc/sys/vm/drop_caches
cat /data/*.sum | sha256sum -c -s && say files good || say files bad
say after $(digest </in-the-base)
say sums $(cat /data/*.sum | digest)
mount -o remount,ro / && say down yes || say down no
poweroff -f
"""


def _megabytes(size: int) -> str:
    return str(size >> 20)


def _with_dependencies(name: str) -> list[Path]:
    """A kernel module after those that it needs, which its own section ``.modinfo`` tells."""
    (path,) = KERNEL.rglob(f"{name}.ko*")
    found = re.search(rb"\0depends=([^\0]*)\0", b"\0" + _module(path))
    assert found, path
    needed = [needs for word in found[1].decode().split(",") if word for needs in _with_dependencies(word)]
    return [*needed, path]


def _module(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def make_initramfs(
    directory: Path, init: str = _INITRAMFS_INIT, modules: Sequence[str] = (), programs: Sequence[str] = ()
) -> Path:
    """What the kernel starts with: drivers of the disk, and the way to the file system on it.

    Or a guest that is all in there: what ``init`` does, with modules and programs of the host that it needs.
    """
    tree = directory / "initramfs"
    for name in ("bin", "dev", "proc", "root", "run", "sys"):
        (tree / name).mkdir(parents=True)
    shutil.copy(_busybox(), tree / "bin/busybox")
    for program in programs:
        _copy_program(program, tree)
    drivers = [path for name in ("virtio_pci", "virtio_blk", *modules) for path in _with_dependencies(name)]
    names = list(dict.fromkeys(path.name.removesuffix(".xz") for path in drivers))
    for path in drivers:
        (tree / path.name.removesuffix(".xz")).write_bytes(_module(path))
    (tree / "init").write_text(init.replace("MODULES", " ".join(names)))
    (tree / "init").chmod(0o755)
    members = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet"],
        input=members.encode(),
        capture_output=True,
        cwd=tree,
        check=True,
    )
    made = directory / "initramfs.gz"
    made.write_bytes(gzip.compress(archive.stdout, 1))
    return made


def _copy_program(name: str, tree: Path) -> None:
    """A program of the host, to ``/bin``, and the libraries that it needs, to where it looks for them."""
    program = shutil.which(name)
    assert program
    shutil.copy(program, tree / "bin")
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", libraries):
        place = tree / library.removeprefix("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)


def make_root(image: Path) -> None:
    """A raw image with the guest's root file system."""
    tree = image.with_suffix(".root")
    for name in ("bin", "data", "dev", "proc", "run", "sbin"):
        (tree / name).mkdir(parents=True)
    shutil.copy(_busybox(), tree / "bin/busybox")
    for name in ("sh", "cat", "cut", "dd", "fstrim", "head", "mount", "poweroff", "rm", "sha256sum", "sync", "touch"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "in-the-base").write_bytes(os.urandom(IN_THE_BASE))
    script = _INIT.replace("DELETED", _megabytes(DELETED)).replace("ZEROS", _megabytes(ZEROS))
    (tree / "sbin/init").write_text(script)
    (tree / "sbin/init").chmod(0o755)
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, image, _DISK_SIZE], capture_output=True, check=True)


def _busybox() -> str:
    found = shutil.which("busybox")
    assert found
    return found


@cache
def accelerator() -> str:
    """``kvm`` if a kernel gets through its start with it, which takes more than ``/dev/kvm``; else ``tcg``."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    # there is no root to mount: the kernel panics at once, which ends the machine
    machine = _machine("kvm", "panic=-1")
    try:
        ended = subprocess.run(machine, stdin=subprocess.DEVNULL, capture_output=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        return "tcg"
    return "kvm" if ended.returncode == 0 and b"panic" in ended.stdout else "tcg"


def _machine(accelerator: str, append: str) -> list[str]:
    return [
        *("qemu-system-x86_64", "-accel", accelerator, "-m", "256", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-serial", "stdio", "-kernel", str(KERNEL / "vmlinuz")),
        # a kernel that gets no processor for a while would take its timer for broken, and panic
        *("-append", f"console=ttyS0 no_timer_check {append}"),
    ]


class Guest:
    """A virtual machine that runs; ``drive`` is what QEMU's ``-drive`` takes beside the file."""

    def __init__(self, directory: Path, initramfs: Path, disk: Path, drive: str) -> None:
        self._log = directory / "serial"
        machine = _machine(accelerator(), "quiet panic=-1")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*machine, "-initrd", str(initramfs), "-drive", f"file={disk},format=raw,if=virtio,{drive}"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self, word: str) -> list[str]:
        """Everything that the guest said under ``word``."""
        return re.findall(rf"guest: {word} (\S+)\r?\n", self._log.read_text(errors="replace"))

    @property
    def round(self) -> int:
        return len(self.said("round"))

    def works_on(self, rounds: int = 2) -> None:
        """Wait until the guest has written so many files more."""
        goal = self.round + rounds
        wait_for(f"round {goal} of the guest", lambda: self._is_over() or self.round >= goal, PATIENCE)
        assert self._process.poll() is None, self._log.read_text(errors="replace")

    def says(self, word: str) -> str:
        """Wait until the guest has said something under ``word``; what."""
        wait_for(f"the guest to say '{word}'", lambda: self._is_over() or bool(self.said(word)), PATIENCE)
        assert self.said(word), self._log.read_text(errors="replace")
        return self.said(word)[0]

    def go_on(self) -> None:
        """Tell the guest to go on to its next step; to the usual one, that it is time for the last."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()

    def shut_down(self) -> None:
        """Have the guest look at its files and shut down; QEMU ends with it."""
        self.go_on()
        wait_for("the guest to shut down", self._is_over, PATIENCE)
        assert self._process.returncode == 0, self._log.read_text(errors="replace")

    def _is_over(self) -> bool:
        return self._process.poll() is not None

    def clean_up(self) -> None:
        if not self._is_over():
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


class Guests:
    """Starts virtual machines that are gone after the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Guest] = []

    def __call__(self, initramfs: Path, disk: Path, drive: str) -> Guest:
        self._started.append(Guest(self._directory, initramfs, disk, drive))
        return self._started[-1]

    def clean_up(self) -> None:
        for guest in self._started:
            guest.clean_up()

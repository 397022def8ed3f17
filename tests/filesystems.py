"""Loop devices and file systems on the flat files of a mount."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commandline import cowfs, ok
from mounting import Mounted, shell, wait_for


@contextmanager
def loop_on(flat: Path) -> Iterator[str]:
    device = ok(cowfs("attach", flat)).strip()
    try:
        yield device
    finally:
        wait_for("the loop device to let go", lambda: cowfs("detach", flat).returncode == 0)


class FileSystem:
    """An ext4 on a loop device on a flat file."""

    def __init__(self, mounted: Mounted, name: str, device: str, root: Path) -> None:
        self.mounted = mounted
        self.name = name
        self.device = device
        self.root = root

    def run(self, command: str) -> str:
        result = shell(command.format(device=self.device, root=self.root))
        assert result.returncode == 0, result.stderr
        return result.stdout

    def used(self) -> int:
        """Bytes that are no free space: files and the file system's own."""
        state = os.statvfs(self.root)
        size = int(subprocess.run(["blockdev", "--getsize64", self.device], capture_output=True, check=True).stdout)
        return size - state.f_bfree * state.f_frsize


@contextmanager
def file_system(mounted: Mounted, name: str, tmp_path: Path, options: str = "defaults") -> Iterator[FileSystem]:
    root = tmp_path / "root"
    root.mkdir()
    with loop_on(mounted.flat(name)) as device:
        made = FileSystem(mounted, name, device, root)
        made.run("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {device}")
        made.run(f"mount -o {options} {{device}} {{root}}")
        try:
            yield made
        finally:
            wait_for("the file system to let go", lambda: shell(f"umount {root}").returncode == 0)

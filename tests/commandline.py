"""Running the command line as a user does, and QEMU's tools beside it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: seconds after which something that should happen soon counts as not happening; a busy machine may take a minute
PATIENCE = 180.0

Result = subprocess.CompletedProcess[str]


def cowfs(*args: str | Path, cwd: Path | None = None, prefix: Sequence[str] = ()) -> Result:
    """Run ``cowfs`` with arguments; ``prefix`` is a command that runs it in turn."""
    return _run([*prefix, sys.executable, "-m", "cowfs", *map(str, args)], cwd)


def qemu_img(*args: str | Path, cwd: Path | None = None) -> Result:
    """Run ``qemu-img``, whatever its exit code."""
    return _run(["qemu-img", *map(str, args)], cwd)


def qemu_io(image: Path, format: str, *commands: str, cwd: Path | None = None) -> None:
    """Run ``qemu-io`` commands on an image; they must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    result = _run(["qemu-io", "-f", format, *words, str(image)], cwd)
    assert result.returncode == 0, result.stdout + result.stderr


def ok(result: Result) -> str:
    """Standard output of a command that must have succeeded, silently."""
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refusal(result: Result, code: int = 1) -> str:
    """The one line with which a command must have refused, without ``cowfs: ``."""
    assert result.returncode == code, result
    assert result.stdout == ""
    assert result.stderr.startswith("cowfs: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert "bug" not in result.stderr
    return result.stderr.removeprefix("cowfs: ").rstrip("\n")


def _run(command: list[str], cwd: Path | None) -> Result:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE, check=False)

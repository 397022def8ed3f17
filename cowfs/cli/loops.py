"""Loop devices of mounted disks, by way of losetup(8)."""

import subprocess

from cowfs.cli.live import Live
from cowfs.errors import CowfsError


def losetup(live: Live, *words: str) -> list[str]:
    """Run losetup; the lines that it prints. Raises what it complains about."""
    try:
        outcome = subprocess.run(["losetup", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CowfsError("losetup is not installed", file=live.path) from None
    if outcome.returncode:
        reason = outcome.stderr.strip().replace("\n", "; ").removeprefix("losetup: ").removeprefix(f"{live.path}: ")
        raise CowfsError(reason or f"losetup ended with code {outcome.returncode}", file=live.path)
    return outcome.stdout.split()


def devices_of(live: Live) -> list[str]:
    """Loop devices that stand on a disk of a mount."""
    return losetup(live, "--noheadings", "--output", "NAME", "--associated", live.path)

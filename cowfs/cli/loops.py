"""Loop devices of mounted disks, by way of losetup(8)."""

import subprocess
from pathlib import Path

from cowfs.cli.live import Live
from cowfs.errors import CowfsError


def losetup(live: Live, *words: str) -> list[str]:
    """Run losetup; the words that it prints. Raises what it complains about."""
    return _run(live, "losetup", *words)


def devices_of(live: Live) -> list[str]:
    """Loop devices that stand on a disk of a mount."""
    return losetup(live, "--noheadings", "--output", "NAME", "--associated", live.path)


def find_partitions(live: Live, device: str) -> None:
    """Make the partitions of a loop device known; not every kernel reads every kind of table. Raises `CowfsError`."""
    name = Path(device).name
    if any(Path("/sys/block", name).glob(f"{name}p*")):
        return
    # 2 is the code for a disk on which there is nothing, 8 that for more than one thing
    if _run(live, "blkid", "-p", "-s", "PTTYPE", "-o", "value", device, accepted=(0, 2, 8)):
        _run(live, "partx", "--add", device)


def _run(live: Live, *command: str, accepted: tuple[int, ...] = (0,)) -> list[str]:
    program = command[0]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CowfsError(f"{program} is not installed", file=live.path) from None
    if outcome.returncode not in accepted:
        reason = outcome.stderr.strip().replace("\n", "; ").removeprefix(f"{program}: ").removeprefix(f"{live.path}: ")
        raise CowfsError(reason or f"{program} ended with code {outcome.returncode}", file=live.path)
    return outcome.stdout.split()

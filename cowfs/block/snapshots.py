"""Internal snapshots: states of a disk that an image keeps inside itself."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cowfs.block.alignment import Area


@dataclass(frozen=True)
class InternalSnapshot:
    """One of them, in the terms of ``qemu-img snapshot -l``; sizes in bytes."""

    id: str
    name: str
    #: when it was made: seconds since the epoch, and nanoseconds
    date: int
    date_nanoseconds: int
    #: nanoseconds that the machine had run
    vm_clock: int
    #: what was saved of the machine's memory and devices
    vm_state_size: int
    disk_size: int
    #: instructions that the machine had executed, where they were counted
    icount: int | None


class SnapshotKey(NamedTuple):
    """What a snapshot is looked up by; None is any id, or any name."""

    id: str | None
    name: str | None

    def __str__(self) -> str:
        """Tell what is wanted, for messages."""
        parts = [f"id '{self.id}'"] if self.id is not None else []
        return " and ".join([*parts, f"name '{self.name}'"] if self.name is not None else parts)

    def fits(self, snapshot: InternalSnapshot) -> bool:
        """Whether a snapshot is one of those that are meant."""
        return self.id in (None, snapshot.id) and self.name in (None, snapshot.name)


class Fill(NamedTuple):
    """What a snapshot is to hold itself: parts of its disk, in order; ``read`` gives its content, offset and length."""

    snapshot: InternalSnapshot
    areas: Sequence[Area]
    read: Callable[[int, int], Awaitable[bytes | bytearray]]

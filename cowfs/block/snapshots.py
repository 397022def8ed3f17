"""Internal snapshots: states of a disk that an image keeps inside itself."""

from dataclasses import dataclass


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

"""What a check of an image found, and what it may put right."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

#: sentences that one result keeps; a wrecked image could have one for each of its clusters
MAX_MESSAGES = 10_000


class Repair(Enum):
    """What a check may change: nothing, clusters that nothing refers to, or everything that is wrong."""

    NONE = "none"
    LEAKS = "leaks"
    ALL = "all"


@dataclass
class CheckResult:
    """Counts in the terms of ``qemu-img check``; every finding is also a sentence.

    After a repair these are the findings of a second check, and ``…_fixed`` says what the repair did.
    """

    #: findings that mean wrong data sooner or later
    corruptions: int = 0
    #: clusters that take space and hold nothing
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    #: clusters of the guest's disk, and how many are allocated, not contiguous, compressed
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    #: bytes; host offset behind the last cluster in use
    image_end_offset: int = 0
    #: sentences, in the order found; the first `MAX_MESSAGES`
    messages: list[str] = field(default_factory=list)
    #: sentences that were left out
    omitted: int = 0

    def corrupt(self, message: str, count: int = 1) -> None:
        """Record ``count`` errors under one sentence."""
        self.corruptions += count
        self.note([f"ERROR {message}"], 1)

    def corrupt_each(self, count: int, messages: Iterable[str]) -> None:
        """Record ``count`` errors with a sentence each, of which only as many are asked for as are kept."""
        self.corruptions += count
        self.note((f"ERROR {message}" for message in messages), count)

    def leak(self, message: str, count: int = 1) -> None:
        """Record ``count`` leaked clusters under one sentence."""
        self.leaks += count
        self.note([f"Leaked {message}"], 1)

    def leak_each(self, count: int, messages: Iterable[str]) -> None:
        """Record ``count`` leaked clusters with a sentence each; see `corrupt_each`."""
        self.leaks += count
        self.note((f"Leaked {message}" for message in messages), count)

    def fixed(self, message: str, *, leaks: int = 0, corruptions: int = 0) -> None:
        """Record what a repair has put right under one sentence."""
        self.leaks_fixed += leaks
        self.corruptions_fixed += corruptions
        self.note([f"Repairing {message}"], 1)

    def note(self, sentences: Iterable[str], count: int) -> None:
        """Keep ``count`` sentences, as far as there is room."""
        room = MAX_MESSAGES - len(self.messages)
        self.messages += islice(sentences, room)
        self.omitted += max(0, count - room)

    def after(self, repair: "CheckResult") -> "CheckResult":
        """Make this the result of the check that follows a repair."""
        self.corruptions_fixed, self.leaks_fixed = repair.corruptions_fixed, repair.leaks_fixed
        self.messages = repair.messages + self.messages
        self.omitted += repair.omitted
        return self

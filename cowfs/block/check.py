"""What a check of an image found."""

from dataclasses import dataclass, field


@dataclass
class CheckResult:
    """Counts in the terms of ``qemu-img check``; every finding is also a sentence."""

    #: findings that mean wrong data sooner or later
    corruptions: int = 0
    #: clusters that take space and hold nothing
    leaks: int = 0
    #: clusters of the guest's disk, and how many are allocated, not contiguous, compressed
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    #: bytes; host offset behind the last cluster in use
    image_end_offset: int = 0
    #: sentences, in the order found
    messages: list[str] = field(default_factory=list)

    def corrupt(self, message: str, count: int = 1) -> None:
        """Record ``count`` errors under one sentence."""
        self.corruptions += count
        self.messages.append(f"ERROR {message}")

    def leak(self, message: str, count: int = 1) -> None:
        """Record ``count`` leaked clusters under one sentence."""
        self.leaks += count
        self.messages.append(f"Leaked {message}")

"""Reading ahead: who reads one stretch after another gets the next ones before asking."""

from dataclasses import dataclass

from cowfs.storage.cache import BLOCK

#: readers that are told apart
READERS = 4
#: bytes that are fetched ahead of a reader: at first, and at the most
FIRST, MOST = 256 << 10, 24 << 20
#: seconds of the link's rate that are fetched ahead, so that on a slow link others need not wait behind it
SECONDS = 1.0


@dataclass
class _Reader:
    """Where somebody will read next, how far has been fetched, in blocks, and how far ahead that is, in bytes."""

    next: int
    fetched: int
    window: int


class Ahead:
    """Finds out who reads in order. ``rate``, in bytes a second, is what the link has done lately."""

    def __init__(self) -> None:
        self._readers: list[_Reader] = []
        self.rate = 0.0

    def measured(self, size: int, seconds: float) -> None:
        """So many bytes have come in so long."""
        if seconds > 0:
            self.rate = size / seconds if not self.rate else (self.rate + size / seconds) / 2

    def wanted(self, first: int, stop: int) -> tuple[int, int]:
        """Somebody reads blocks from ``first`` up to ``stop``; return those that are worth fetching now, perhaps none.

        What has been returned counts as fetched; `lag` takes a part of it back.
        """
        for reader in self._readers:
            if reader.next - 1 <= first <= reader.next:
                self._readers.remove(reader)
                break
        else:
            reader = _Reader(stop, stop, 0)
            self._readers = self._readers[-READERS + 1 :]
            self._readers.append(reader)
            return stop, stop
        self._readers.append(reader)
        if stop > reader.next:
            # not each time that a block is read in small pieces
            reader.window = min(max(FIRST, 2 * reader.window), max(FIRST, int(self.rate * SECONDS)), MOST)
            reader.next = stop
        begin = max(stop, reader.fetched)
        reader.fetched = max(begin, stop + reader.window // BLOCK)
        return begin, reader.fetched

    def lag(self, stop: int) -> None:
        """Of what was returned last, nothing from ``stop`` on is fetched after all."""
        self._readers[-1].fetched = stop

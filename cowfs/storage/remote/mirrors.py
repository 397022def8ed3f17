"""Whether what another server sends, or the same one under another ETag, is the object that is being read.

ETags are made by each server for itself (RFC 9110, section 8.8.3): a redirection that leads to one mirror after the
other brings another one each time, and says nothing by that. So samples of the content are compared: of what has been
read before, and of places all over the object. A server that goes on calling the object by one and the same other
name has another one, whatever the samples say; one with a new name for it at each request has no names for versions.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import trio
import xxhash

from cowfs.errors import CowfsError
from cowfs.storage.remote.store import AwayError, Facts, changed

#: places that are compared, all over an object; those of what was read before that are remembered; bytes at each
SPREAD, READ, BYTES = 30, 32, 4096
#: requests for samples at a time
_AT_ONCE = 6
#: times that a server is asked what it calls the object, before that counts as its name
ASKED = 16


class Answer(NamedTuple):
    """Where an answer comes from, as is asked for and as is compared, and of which version it says that it is."""

    url: Any
    place: str
    version: str


class OtherVersionError(Exception):
    """An answer is of a version that is not known yet."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.version)
        self.answer = answer


#: gives the bytes from an offset up to another one as a URL has them now, and what the answer says of itself
Sample = Callable[[Any, int, int], Awaitable[tuple[bytes, Answer]]]


class Mirrors:
    """What is known of the servers of one object, the first of which is ``first``."""

    def __init__(self, facts: Facts, first: Answer, sample: Sample) -> None:
        self._size = facts.size
        self._first = first
        self._sample = sample
        self._versions: dict[str, set[str]] = {first.place: {first.version}}
        #: digests by offset, of what was read
        self._read: dict[int, bytes] = {}
        self._comparing = trio.Lock()
        self._probes = 0
        #: places of servers that have several names for the same content
        self._fickle: set[str] = set()

    def knows(self, answer: Answer) -> bool:
        """Whether what comes with an answer is of the object."""
        return answer.place in self._fickle or any(answer.version in known for known in self._versions.values())

    @property
    def is_one(self) -> bool:
        """Whether all answers were of the same version."""
        return sum(map(len, self._versions.values())) == 1

    def remember(self, offset: int, data: bytes | bytearray) -> None:
        """Take a sample of what was read."""
        if len(self._read) < READ or offset in self._read:
            self._read[offset] = _digest(data)

    async def look(self, answer: Answer) -> None:
        """Compare samples, and know the version from then on.

        Raises `StorageError`, ESTALE, if it is another object.
        """
        async with self._comparing:
            if self.knows(answer):
                return
            known = await self._known()
            answers = await self._compare(answer, known)
            versions = self._versions.setdefault(answer.place, set())
            if versions:
                if all(each == answer.version for each in answers):
                    raise changed(
                        f"the store calls it another version, again and again; {len(known)} samples of its content were"
                        " compared, and are the same"
                    )
                self._fickle.add(answer.place)
            versions.add(answer.version)

    @property
    def is_fickle(self) -> bool:
        """Whether some server's names for versions do not tell them from each other."""
        return bool(self._fickle)

    async def probe(self, url: Any) -> None:
        """Compare one sample, where versions tell nothing. Raises `StorageError`, ESTALE, if it differs."""
        self._probes += 1
        place, digest = list(self._read.items())[self._probes % len(self._read)]
        [(data, _)] = await self._fetch(url, [place])
        if _digest(data) != digest:
            raise changed("a sample of its content that was read before is another now")

    async def _known(self) -> dict[int, bytes]:
        """Digests that there are to compare with."""
        last = max(0, self._size - BYTES)
        places = sorted(
            {last * number // (SPREAD - 1) // BYTES * BYTES for number in range(SPREAD)} - self._read.keys()
        )
        try:
            found = await self._fetch(self._first.url, places)
        except (AwayError, CowfsError):
            # it may be what is away; what was read has to do
            return dict(self._read)
        if not all(self.knows(answer) for _, answer in found):
            return dict(self._read)
        return self._read | {place: _digest(data) for place, (data, _) in zip(places, found, strict=True)}

    async def _compare(self, answer: Answer, known: dict[int, bytes]) -> list[str]:
        """Compare with what a server has; the versions that it has said on the way."""
        # a server that calls it one name now and another then has to have the chance to show that
        places = sorted(known) * -(-ASKED // len(known)) if answer.place in self._versions else sorted(known)
        found = await self._fetch(answer.url, places)
        others = {place for place, (data, _) in zip(places, found, strict=True) if _digest(data) != known[place]}
        if others:
            raise changed(
                f"the store calls it another version, and of {len(known)} samples of its content that were compared,"
                f" {len(others)} {'differs' if len(others) == 1 else 'differ'}"
            )
        return [said.version for _, said in found]

    async def _fetch(self, url: Any, places: Sequence[int]) -> list[tuple[bytes, Answer]]:
        found: list[tuple[bytes, Answer] | None] = [None] * len(places)
        errors: list[AwayError | CowfsError] = []
        limit = trio.CapacityLimiter(_AT_ONCE)

        async def fetch(number: int, place: int) -> None:
            async with limit:
                if errors:
                    return
                try:
                    found[number] = await self._sample(url, place, min(place + BYTES, self._size))
                except (AwayError, CowfsError) as error:
                    errors.append(error)

        async with trio.open_nursery() as nursery:
            for number, place in enumerate(places):
                nursery.start_soon(fetch, number, place)
        if errors:
            raise errors[0]
        return [each for each in found if each is not None]


def _digest(data: bytes | bytearray) -> bytes:
    return xxhash.xxh3_128_digest(memoryview(data)[:BYTES])

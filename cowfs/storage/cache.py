"""What has come in from servers lately, in blocks, with one bound for all objects of the program."""

from collections import OrderedDict
from itertools import count
from typing import ClassVar

#: bytes of a block: what is kept, and the least that is asked for
BLOCK = 64 << 10
#: bytes that are kept
BOUND = 96 << 20

#: the bytes of one, which nobody changes
Block = bytes | bytearray
_Key = tuple[int, int]


class Blocks:
    """The blocks of one object that are kept; the one used longest ago, of any object, goes first."""

    _all: ClassVar[OrderedDict[_Key, Block]] = OrderedDict()
    _numbers = count()

    def __init__(self) -> None:
        self._owner = next(self._numbers)

    def get(self, number: int) -> Block | None:
        """Return a block if it is kept."""
        data = self._all.get((self._owner, number))
        if data is not None:
            self._all.move_to_end((self._owner, number))
        return data

    def __contains__(self, number: int) -> bool:
        return (self._owner, number) in self._all

    def put(self, number: int, data: Block) -> None:
        """Keep a block; only an object's last may be shorter than others."""
        self._all[self._owner, number] = data
        while len(self._all) * BLOCK > BOUND:
            self._all.popitem(last=False)

    def clear(self) -> None:
        """Keep nothing of this object."""
        for key in [key for key in self._all if key[0] == self._owner]:
            del self._all[key]

"""The options of a block device as QEMU writes them down: JSON as its parser takes it, and values as its drivers do.

QEMU takes an option's value as JSON has it or as text: ``512`` and ``"512"`` are one, and so are ``true`` and ``"on"``.
Options of options stand in objects of their own, or have dots in their names: ``{"file": {"driver": …}}`` is the same
as ``{"file.driver": …}``.

Names also come from headers, which anybody may have written: what is not understood to the last byte is refused.
Every error is `Unsupported`, with a sentence that follows the name.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from cowfs.errors import Unsupported, UsageError
from cowfs.units import parse_size

#: what stands before the options in a name
PREFIX = "json:"

#: a string between quotes of either kind
_STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
#: what has to be written in another way between double quotes: a quote with or without its backslash, other escapes
_QUOTE = re.compile(r"\\.|\"", re.DOTALL)
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")
_ON, _OFF = ("on", "yes", "true", "y"), ("off", "no", "false", "n")

#: says whether a value is one that an option takes
Check = Callable[[Any], bool]


def is_json_name(name: str) -> bool:
    """Whether a name is that of options; a file of such a name is called ``./json:…``."""
    return name.startswith(PREFIX)


def parse_tree(name: str) -> dict[str, Any]:
    """Read a name that `is_json_name` as objects within objects."""
    try:
        name.encode()
        tree = json.loads(
            _STRING.sub(_double_quoted, name.removeprefix(PREFIX)),
            object_pairs_hook=_without_doubles,
            parse_constant=_refuse_constant,
        )
        if not isinstance(tree, dict):
            raise Unsupported("is JSON, but no block device")
        return _nested(tree)
    except (ValueError, RecursionError):
        raise Unsupported("is not what it says, JSON") from None


def _double_quoted(found: re.Match[str]) -> str:
    """Write a string as every JSON parser takes it."""
    return '"' + _QUOTE.sub(lambda part: {'"': '\\"', "\\'": "'"}.get(part[0], part[0]), found[0][1:-1]) + '"'


def _refuse_constant(word: str) -> NoReturn:
    """Refuse NaN and infinities, which no JSON has."""
    raise ValueError(word)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise Unsupported("says something twice")
    return tree


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Make ``{"file": {"driver": …}}`` of ``{"file.driver": …}``."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = tree
        for step in path:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise Unsupported("says something twice")
        found = _nested(value) if isinstance(value, dict) else value
        if last in place:
            if not isinstance(place[last], dict) or not isinstance(found, dict) or place[last].keys() & found.keys():
                raise Unsupported("says something twice")
            place[last] |= found
        else:
            place[last] = found
    return tree


def is_switch(value: Any) -> bool:
    """Whether a value is one of an option that is on or off."""
    return isinstance(value, bool) or value in (*_ON, *_OFF)


def one_of(*words: str) -> Check:
    """Return a check for one of some words."""
    return lambda value: isinstance(value, str) and value in words


def is_size(value: Any) -> bool:
    """Whether a value is a number of bytes, or of anything else."""
    return _as_size(value) is not None


def _as_size(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", value):
            value = int(value, 16)
        else:
            try:
                value = parse_size(value)
            except UsageError:
                return None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value < 1 << 63 else None


#: options of every block device that change nothing about what can be read
HARMLESS: Mapping[str, Check] = {
    "node-name": lambda value: isinstance(value, str) and _NODE_NAME.fullmatch(value) is not None,
    "auto-read-only": is_switch,
    "force-share": is_switch,
    "discard": one_of("ignore", "off", "unmap", "on"),
    "detect-zeroes": one_of("off", "on", "unmap"),
    "cache.direct": is_switch,
    "cache.no-flush": is_switch,
}


class Options:
    """The options of one block device, each of which has to be taken: `refuse_rest` refuses what nobody knows."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tree = dict(tree)

    def __contains__(self, key: str) -> bool:
        """Whether there is an option that has not been taken yet."""
        return key in self._tree

    def peek_text(self, key: str) -> str | None:
        """Return what `take_text` would take."""
        return Options(self._tree).take_text(key)

    def take_text(self, key: str) -> str | None:
        """Take a text; None if there is none."""
        value = self._tree.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, str):
            raise Unsupported(f"has a '{key}' that is no text")
        # half of a surrogate pair is no letter
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Unsupported(f"has a '{key}' with letters that no name has")
        return value

    def take_number_or_text(self, key: str) -> str | None:
        """Take a text, or a number as text; None if there is none."""
        value = self._tree.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            self._tree[key] = str(value) if abs(value) < 1 << 63 else ""
        return self.take_text(key)

    def take_size(self, key: str) -> int | None:
        """Take a number of bytes; None if there is none."""
        value = self._tree.pop(key, None)
        if value is None:
            return None
        size = _as_size(value)
        if size is None:
            raise Unsupported(f"has the '{key}' {json.dumps(value)}, which is no number of bytes")
        return size

    def take_switch(self, key: str) -> bool:
        """Take what is on or off; off if it is not there."""
        value = self._tree.pop(key, False)
        if not is_switch(value):
            raise Unsupported(f"has '{key}', which is neither on nor off")
        return value is True or value in _ON

    def take_options(self, key: str) -> "Options | None":
        """Take the options of something else; None if there are none."""
        value = self._tree.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise Unsupported(f"has a '{key}' that another block device would have to define")
        return Options(value)

    def take_harmless(self, known: Mapping[str, Check]) -> None:
        """Take options that mean nothing here, beside those that every block device has; their values must be valid."""
        for key, check in {**HARMLESS, **known}.items():
            tree, _, last = key.rpartition(".")
            place = self._tree.get(tree) if tree else self._tree
            if not isinstance(place, dict) or last not in place:
                continue
            if not check(place.pop(last)):
                raise Unsupported(f"has a '{key}' that makes no sense")
            if tree and not place:
                del self._tree[tree]

    def refuse_rest(self) -> None:
        """Refuse what has not been taken."""
        if self._tree:
            raise Unsupported(f"has '{min(self._tree)}', which cowfs does not know")

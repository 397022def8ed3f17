"""``snapshot``: put a new overlay on top of the disk."""

from collections.abc import Sequence

from cowfs.errors import UsageError
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.registry import format_named
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served

VERBS = {
    "create": "create FILE [format=FMT] [reuse-external=yes|no] [backing-names=keep|relative|absolute]: FILE, a new"
    " image, or one that was prepared, becomes the active layer; qcow2 if not said otherwise"
}
_KEYS = ("format", "reuse-external", "backing-names")


async def render(served: Served) -> str:
    """Return the file of the active layer."""
    return f"{served.file}\n"


async def command(served: Served, text: str) -> None:
    """Make an overlay, or take one. The file's name may have spaces in it."""
    verb, _, rest = text.partition(" ")
    file, keys = _split(rest.strip())
    if verb != "create" or not file:
        raise UsageError(f"'{text}' is no command; write {VERBS['create'].partition(':')[0]}")
    reuse = _choice(keys, "reuse-external", ("no", "yes")) == "yes"
    names = _choice(keys, "backing-names", [names.value for names in BackingNames]) if "backing-names" in keys else None
    format = format_named(keys.get("format", "qcow2")).name
    await served.put_overlay(file, format, reuse=reuse, names=BackingNames(names) if names else None)


def _split(text: str) -> tuple[str, dict[str, str]]:
    """Take the keys off the end of a text; of two that are the same, the last counts."""
    keys: dict[str, str] = {}
    while True:
        head, sign, last = text.rpartition(" ")
        name, equals, value = last.partition("=")
        if not sign or not equals or name not in _KEYS:
            return text, keys
        keys.setdefault(name, value)
        text = head.rstrip()


def _choice(keys: dict[str, str], key: str, words: Sequence[str]) -> str:
    """Value of a key that takes one of some words; the first is the default."""
    value = keys.get(key, words[0])
    if value not in words:
        raise UsageError(f"{key}={value} is not one of {', '.join(words)}")
    return value


FILE = ControlFile("snapshot", "file of the active layer; write to put a new one on top", render, command, VERBS)

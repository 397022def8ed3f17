"""``snapshot``: put a new overlay on top of the disk."""

from cowfs.errors import UsageError
from cowfs.formats.registry import format_named
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served

VERBS = {"create": "create FILE [format=FMT]: FILE, a new image, becomes the active layer; qcow2 if not said otherwise"}


async def render(served: Served) -> str:
    """Return the file of the active layer."""
    return f"{served.file}\n"


async def command(served: Served, text: str) -> None:
    """Make an overlay. The file's name may have spaces in it."""
    verb, _, rest = text.partition(" ")
    head, sign, last = rest.strip().rpartition(" format=")
    file, format = (head.strip(), last) if sign else (rest.strip(), "qcow2")
    if verb != "create" or not file:
        raise UsageError(f"'{text}' is no command; write {VERBS['create'].partition(':')[0]}")
    await served.put_overlay(file, format_named(format).name)


FILE = ControlFile("snapshot", "file of the active layer; write to put a new one on top", render, command, VERBS)

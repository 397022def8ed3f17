"""``resize``: the size of the disk."""

from cowfs.errors import NotPermitted, ReadOnly, UsageError
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served
from cowfs.units import parse_new_size

VERBS = {"SIZE": "SIZE, +SIZE or -SIZE, then shrink if the disk may become smaller: set the size"}


async def render(served: Served) -> str:
    """Return the size in bytes."""
    return f"{served.disk.size}\n"


async def command(served: Served, text: str) -> None:
    """Set the size; everything that has the flat file open sees it."""
    size_text, _, rest = text.partition(" ")
    if rest.strip() not in ("", "shrink"):
        raise UsageError(f"'{text}' is no command; write {VERBS['SIZE']}")
    disk = served.disk
    if disk.read_only:
        raise ReadOnly("is open read-only", file=served.file)
    size = parse_new_size(size_text, disk.size)
    if size < disk.size and not rest:
        raise NotPermitted(f"to cut the disk from {disk.size} to {size} bytes, add the word shrink", file=served.file)
    served.may_shrink_to = size
    try:
        await served.truncate(size)
    finally:
        served.may_shrink_to = None


FILE = ControlFile("resize", "size of the disk in bytes; write to change it", render, command, VERBS)

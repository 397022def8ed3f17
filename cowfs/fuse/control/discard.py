"""``discard``: give back the space of a range."""

from cowfs.errors import UsageError
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served
from cowfs.units import parse_size

VERBS = {"OFFSET": "OFFSET LENGTH: the range reads as zeros, and its space is given back"}


async def render(served: Served) -> str:
    """Return the bytes of a cluster: what is given back as a whole."""
    return f"{served.disk.cluster_size}\n"


async def command(served: Served, text: str) -> None:
    """Discard a range."""
    words = text.split()
    if len(words) != 2:
        raise UsageError(f"'{text}' is no command; write OFFSET LENGTH")
    await served.discard(*map(parse_size, words))


FILE = ControlFile("discard", "bytes of a cluster; write a range to give its space back", render, command, VERBS)

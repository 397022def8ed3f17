"""``copy-on-read``: whether what a read fetches from below stays in the active layer."""

from cowfs.errors import ReadOnly, UsageError
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served

VERBS = {
    "on": "on: keep in the active layer what reads fetch from below",
    "off": "off: do not; a stream that runs keeps it on until it ends",
}


async def render(served: Served) -> str:
    """Return what is in force."""
    return "on\n" if served.disk.copy_on_read else "off\n"


async def command(served: Served, text: str) -> None:
    """Switch it."""
    if text not in VERBS:
        raise UsageError(f"'{text}' is neither on nor off")
    if served.disk.read_only:
        raise ReadOnly("is open read-only", file=served.file)
    served.set_copy_on_read(text == "on")


FILE = ControlFile("copy-on-read", "on or off; write to switch", render, command, VERBS)

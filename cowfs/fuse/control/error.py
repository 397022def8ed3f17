"""``error``: why the last command failed."""

from cowfs.fuse.control.file import ControlFile, Subject
from cowfs.fuse.images import Mount, Served


async def render(subject: Subject) -> str:
    """Return the sentence, or nothing if the last command worked."""
    return f"{subject.error}\n" if subject.error else ""


_SUMMARY = "why the last command failed; empty if it worked"

FILE: ControlFile[Served] = ControlFile("error", _SUMMARY, render)
MOUNT_FILE: ControlFile[Mount] = ControlFile("error", _SUMMARY, render)

"""``.cowfs/control``: which images the mount has."""

import trio

from cowfs.errors import UsageError
from cowfs.fuse.control.file import ControlFile, one_line
from cowfs.fuse.images import Mount, Source

VERBS = {
    "add": "add [NAME=]PATH [format=FMT] [ro]: serve one more image; PATH is absolute",
    "remove": "remove NAME: take an image out; nobody may have it open",
}


async def render(mount: Mount) -> str:
    """Return a line for each image: its name, and the file of its active layer."""
    return "".join(f"{served.name} {one_line(served.file)}\n" for served in mount.images.values())


async def command(mount: Mount, text: str) -> None:
    """Add or remove an image."""
    verb, _, rest = text.partition(" ")
    rest = rest.strip()
    if verb not in VERBS or not rest:
        raise UsageError(f"'{text}' is no command; write one of: " + "; ".join(VERBS.values()))
    if verb == "remove":
        await mount.remove(rest)
    else:
        await mount.add(await _source(rest))


async def _source(text: str) -> Source:
    format, read_only = None, False
    while True:
        front, _, word = text.rpartition(" ")
        if front and word == "ro":
            read_only = True
        elif front and word.startswith("format="):
            format = word.removeprefix("format=")
        else:
            break
        text = front.rstrip()
    # in a thread: the path may lie in the mount, which this thread serves
    path, name, _, _ = await trio.to_thread.run_sync(Source.parse, text)
    if not path.startswith("/"):
        raise UsageError(f"'{path}' is no absolute path; the server's working directory is /")
    return Source(path, name, format, read_only)


FILE = ControlFile("control", "the images; write to add or remove one", render, command, VERBS)

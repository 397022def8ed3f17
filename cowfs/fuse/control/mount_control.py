"""``.cowfs/control``: which images the mount has."""

from cowfs.errors import UsageError
from cowfs.fuse.control.file import ControlFile, one_line
from cowfs.fuse.images import Mount, Source
from cowfs.storage import is_json_name, is_remote

VERBS = {
    "add": "add [[format=FMT] [ro] --] [NAME=]PATH [format=FMT] [ro]: serve one more image; PATH is absolute",
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
        await mount.add(_source(rest))


def _source(text: str) -> Source:
    """Read what follows ``add``: options behind the path, or before it and ``--``, which then ends only the path."""
    front, sign, named = f" {text}".partition(" -- ")
    words = front.split()
    if not sign or not all(map(_is_option, words)):
        named, words = text, []
        while (split := named.rpartition(" "))[0] and _is_option(split[2]):
            named = split[0].rstrip()
            words.insert(0, split[2])
    read_only = "ro" in words
    format = next((word.removeprefix("format=") for word in reversed(words) if word != "ro"), None)
    if _is_absolute(named):
        return Source(named, None, format, read_only)
    name, _, path = named.partition("=")
    if not _is_absolute(path):
        raise UsageError(f"'{path or named}' is no absolute path; the server's working directory is /")
    return Source(path, name, format, read_only)


def _is_absolute(path: str) -> bool:
    # an absolute path in a json: name is seen to when it is read
    return path.startswith("/") or is_json_name(path) or is_remote(path)


def _is_option(word: str) -> bool:
    return word == "ro" or word.startswith("format=")


FILE = ControlFile("control", "the images; write to add or remove one", render, command, VERBS)

"""``stats``: counters of one image."""

from dataclasses import asdict

from cowfs.fuse.control.file import ControlFile, key_values
from cowfs.fuse.images import Served


def counters(served: Served) -> dict[str, int]:
    """Return all counters since the image was opened."""
    return {name.replace("_", "-"): value for name, value in asdict(served.disk.stats).items()}


async def render(served: Served) -> str:
    """Return a line for each counter."""
    return key_values(counters(served))


FILE = ControlFile("stats", "counters since the image was opened", render)

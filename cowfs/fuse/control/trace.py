"""``trace``: recording which parts of the disk are read first."""

from cowfs.errors import UsageError
from cowfs.fuse.control.file import ControlFile, key_values
from cowfs.fuse.images import Served

VERBS = {
    "record": "record FILE: write down what reads fetch from below, in their order; FILE must not exist",
    "stop": "stop: end that, and write FILE",
}


async def render(served: Served) -> str:
    """Return what is being recorded, or was."""
    return key_values(served.tracer.facts)


async def command(served: Served, text: str) -> None:
    """Begin or end. The file's name may have spaces in it."""
    verb, _, rest = text.partition(" ")
    if verb == "record" and rest.strip():
        await served.record(rest.strip())
    elif text == "stop":
        await served.stop_recording()
    else:
        raise UsageError(f"'{text}' is no command; write record FILE, or stop")


FILE = ControlFile("trace", "which parts are read first, and whether that is recorded", render, command, VERBS)

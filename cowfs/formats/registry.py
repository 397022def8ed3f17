"""The formats that cowfs knows, and how to tell which one a file has."""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, Protocol

from cowfs.block.disk import Disk
from cowfs.block.image import Backing, Image
from cowfs.block.metacache import DEFAULT_BOUND
from cowfs.errors import UsageError
from cowfs.formats import qcow2, qed, raw
from cowfs.formats.measuring import Measured
from cowfs.storage import Storage
from cowfs.storage.blockoptions import Check

#: bytes at the start of a file that are enough to tell its format
PROBE_BYTES = 512

#: ``create -o``: option name to text
Options = Mapping[str, str]


class Open(Protocol):
    """Opens an image of one format."""

    def __call__(
        self, storage: Storage, *, cache_size: int = DEFAULT_BOUND, for_repair: bool = False
    ) -> Awaitable[Image]:
        """Read the header; raises `InvalidImage`, `CorruptImage` or `Unsupported`.

        ``cache_size`` bounds the bytes of tables that are kept in memory, beside those that always are; eight
        tables fit in however small it is.
        ``for_repair`` opens images too that are too damaged to be written, for a check and nothing else.
        """


class Format(NamedTuple):
    """One format, as the rest of the program reaches it.

    The storage stays the caller's to close if ``open`` raises. ``probe`` says whether a file that starts with some
    bytes has this format.
    ``create`` fills an empty storage: size in bytes, backing, options; ``options`` lists what it takes, with a
    line of help for each.
    """

    name: str
    open: Open
    probe: Callable[[bytes], bool]
    create: Callable[[Storage, int, Backing | None, Options], Awaitable[None]]
    options: Mapping[str, str]
    #: says how large a file would be: bytes of the disk, or a disk to be copied; options
    measure: Callable[[int, Disk | None, Options], Awaitable[Measured]]
    has_backing: bool
    #: whether clusters can be written packed
    packs: bool = False
    #: options that QEMU's driver has and that mean nothing here, in ``json:`` names
    device_options: Mapping[str, Check] = {}


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "qcow2",
            qcow2.open_image,
            qcow2.probe,
            qcow2.create,
            qcow2.OPTIONS,
            qcow2.measure,
            has_backing=True,
            packs=True,
            device_options=qcow2.DEVICE_OPTIONS,
        ),
        Format("qed", qed.open_image, qed.probe, qed.create, qed.OPTIONS, qed.measure, has_backing=True),
        Format("raw", raw.open_image, raw.probe, raw.create, raw.OPTIONS, raw.measure, has_backing=False),
    )
}


def format_named(name: str) -> Format:
    """Return the format of a name; `UsageError` says which there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise UsageError(f"unknown format '{name}'; cowfs knows {', '.join(FORMATS)}") from None


async def open_guessed(storage: Storage, *, cache_size: int = DEFAULT_BOUND, for_repair: bool = False) -> Image:
    """Open an image of unnamed format. One that is taken for raw may not become anything else while in use."""
    image = await (await probe(storage)).open(storage, cache_size=cache_size, for_repair=for_repair)
    if isinstance(image, raw.RawImage):
        image.guard_head(PROBE_BYTES, _other_format)
    return image


def _other_format(head: bytes) -> str | None:
    found = _probe_head(head)
    if found.name == "raw":
        return None
    return f"the disk's format was guessed, and a {found.name} header in it would change that; give format=raw"


async def probe(storage: Storage) -> Format:
    """Tell a file's format from its first bytes; what nothing else claims is raw."""
    head = await storage.read_bytes(0, min(PROBE_BYTES, storage.length))
    return _probe_head(head)


def _probe_head(head: bytes) -> Format:
    return next(format for format in FORMATS.values() if format.probe(head))

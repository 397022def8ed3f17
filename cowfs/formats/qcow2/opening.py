"""Telling a qcow2 file, and opening it."""

from cowfs.block.metacache import MetadataCache
from cowfs.errors import CowfsError
from cowfs.formats.qcow2.datafile import ExternalDataImage
from cowfs.formats.qcow2.image import Qcow2Image
from cowfs.formats.qcow2.layout import MAGIC, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, parse_header
from cowfs.storage.base import Storage


def probe(head: bytes) -> bool:
    """Whether a file that starts with these bytes says that it is qcow2."""
    return head.startswith(MAGIC)


async def open_image(storage: Storage) -> Qcow2Image:
    """Read header, L1 and refcount table. Raises `InvalidImage`, `CorruptImage`, `Unsupported`."""
    try:
        head = await storage.read_bytes(0, min(storage.length, 1 << MIN_CLUSTER_BITS))
        bits = int.from_bytes(head[20:24], "big")
        if MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            head = await storage.read_bytes(0, min(storage.length, 1 << bits))
        header = parse_header(head, storage.length)
        kind = Qcow2Image if header.data_file is None else ExternalDataImage
        image = kind(storage, header, MetadataCache(storage, "big"))
        await image.load(head)
    except CowfsError as error:
        error.file = error.file or storage.name
        raise
    return image

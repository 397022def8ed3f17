"""QEMU's ``json:`` names of images: a format's driver, or none, over what `cowfs.storage.jsonname` reads."""

from typing import NamedTuple

from cowfs.errors import InvalidImage, Unsupported
from cowfs.formats.registry import FORMATS
from cowfs.storage import is_json_name
from cowfs.storage.blockoptions import Options, parse_tree
from cowfs.storage.jsonname import PROTOCOLS, RAW, Place, place_of, take_file


class Named(NamedTuple):
    """What an image's name stands for: a name that `cowfs.storage.open_storage` takes, and a format if it is said."""

    name: str
    format: str | None


def resolve_name(name: str, format: str | None = None) -> Named:
    """Return what a name stands for; any but a ``json:`` name stands for itself.

    ``format`` is what is known of the format besides. Without a format's driver, and without that, the bytes of a file,
    device or export are the disk, as with QEMU. Raises `Unsupported`, or `InvalidImage` if the two formats differ, with
    a sentence that follows the name.
    """
    if not is_json_name(name):
        return Named(name, format)
    place, said = _read(name)
    if said is not None and format not in (None, said):
        raise InvalidImage(f"is said to be {format} too")
    return Named(place.name, format or said or _only_bytes(name))


def absolute_name(name: str) -> str:
    """Return a ``json:`` name that `resolve_name` has returned, or that of a file, for another working directory."""
    return place_of(name).absolute().name if is_json_name(name) else Place(name).absolute().name


def _only_bytes(name: str) -> str | None:
    return RAW if parse_tree(name).get("driver") in PROTOCOLS else None


def _read(name: str) -> tuple[Place, str | None]:
    """Where the bytes are, and the format's driver if there is one."""
    options = Options(parse_tree(name))
    driver = options.peek_text("driver")
    if driver is None:
        return take_file(options), None
    if driver in (RAW, *PROTOCOLS):
        return place_of(name), RAW if driver == RAW else None
    if driver not in FORMATS:
        known = ", ".join((*PROTOCOLS, *FORMATS))
        raise Unsupported(f"needs the driver '{driver}', which cowfs does not have; it knows {known}")
    options.take_harmless(FORMATS[driver].device_options)
    return take_file(options), driver

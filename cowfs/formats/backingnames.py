"""By what name an image records a backing file that it did not have before.

Images that name each other by relative names can be moved together, and a job or a snapshot must not end that. So a
name that takes the place of relative ones is relative too, and one that takes the place of an absolute one is
absolute, if the user does not want it otherwise.

A relative name is looked up from the directory that the image is named in, by the kernel: ``..`` leads out of where a
symbolic link leads to. So names are put together from those that were there, and shortened only if they lead to the
same file then.
"""

import os
import stat
from collections.abc import Sequence
from enum import Enum

from cowfs.block.layer import Layer
from cowfs.errors import UsageError
from cowfs.formats.chain import recorded_path
from cowfs.storage import as_path, is_json_name, local_path

#: bytes of a name that a header has room for, in qcow2 and QED
MAX_NAME = 1023


class BackingNames(str, Enum):
    """What names of backing files are like that a job or a snapshot records."""

    #: relative in place of relative ones, else absolute
    KEEP = "keep"
    #: relative, as far as there is a path
    RELATIVE = "relative"
    #: absolute, as far as there is a path
    ABSOLUTE = "absolute"


def name_below(layers: Sequence[Layer], above: int, below: int, wanted: BackingNames) -> str:
    """Return how the layer at depth ``above`` calls the one at ``below`` once those between them are gone.

    What stands for no path, as a URI, stays as it was recorded. Looks at files, and blocks. Raises `UsageError` for a
    name that no header has room for.
    """
    recorded = [layer.backing.name if layer.backing else "" for layer in layers[above:below]]
    paths = [recorded_path(name) for name in recorded]
    base = local_path(layers[below].name)
    if paths[-1] is None or base is None or (below == above + 1 and wanted is BackingNames.KEEP):
        return recorded[-1]
    if wanted is BackingNames.ABSOLUTE:
        return _checked(paths[-1] if paths[-1].startswith("/") else _absolute(base), layers[above])
    folder = _folder(layers[above].name)
    if all(path is not None and not path.startswith("/") for path in paths):
        joined = ""
        for path in paths:
            joined = os.path.join(os.path.dirname(joined), path or "")  # noqa: PTH118, PTH120
        return _checked(as_path(_shortened(joined, folder)), layers[above])
    if wanted is BackingNames.RELATIVE:
        return _checked(_relative(base, folder), layers[above])
    return _checked(paths[-1] if paths[-1].startswith("/") else _absolute(base), layers[above])


def name_of_active(active: Layer, overlay: str, wanted: BackingNames) -> str:
    """Return how a new image of the path ``overlay`` calls the active layer, on which it is put.

    A relative name follows a relative one; what has no backing file yet is called by its name alone in its own
    directory. Names that lead to a block device, or are recorded in one, are absolute. Looks at files, and blocks; see
    `name_below`.
    """
    path = local_path(active.name)
    if path is None or is_json_name(active.name):
        return active.name
    if wanted is BackingNames.KEEP:
        known = recorded_path(active.backing.name) if active.backing else None
        is_relative = known is not None and not known.startswith("/")
        is_beside = os.path.realpath(_folder(path)) == os.path.realpath(_folder(overlay))
        has_device = _is_device(path) or _is_device(overlay)
        wanted = BackingNames.RELATIVE if (is_relative or is_beside) and not has_device else BackingNames.ABSOLUTE
    name = _absolute(path) if wanted is BackingNames.ABSOLUTE else _relative(path, _folder(overlay))
    return _checked(name, active)


def _folder(name: str) -> str:
    """Return the directory from which relative names in an image are meant."""
    return os.path.dirname(local_path(name) or "") or "."  # noqa: PTH120


def _absolute(path: str) -> str:
    path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
    return _shortened(path, "/")


def _shortened(path: str, folder: str) -> str:
    """Take ``..`` and ``.`` out of a path from ``folder``, if it leads to the same file then."""
    short = os.path.normpath(path)
    return short if _is_same(os.path.join(folder, short), os.path.join(folder, path)) else path  # noqa: PTH118


def _relative(path: str, folder: str) -> str:
    """Return the way from a directory to a file: as the two are called, or as they really lie.

    Of the two ways that which climbs less is the one that leads out of the smaller tree, if out of any.
    """
    real = os.path.join(os.path.realpath(_folder(path)), os.path.basename(path))  # noqa: PTH118, PTH119
    ways = [os.path.relpath(path, folder), os.path.relpath(real, os.path.realpath(folder))]
    known = [way for way in ways if _is_same(os.path.join(folder, way), path)]  # noqa: PTH118
    return as_path(min(known, key=lambda way: way.split("/").count("..")))


def _is_same(first: str, second: str) -> bool:
    """Whether two paths name the same entry of the same directory, from where names in that file are meant too."""
    folders = {os.path.realpath(_folder(path)) for path in (first, second)}
    return len(folders) == 1 and os.path.basename(first) == os.path.basename(second)  # noqa: PTH119


def _is_device(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH110, PTH116


def _checked(name: str, above: Layer) -> str:
    size = len(os.fsencode(name))
    if size > MAX_NAME:
        raise UsageError(
            f"its backing file would be called '{name}', which has {size} bytes, and its header has room for"
            f" {MAX_NAME}; say with backing-names whether the name is to be relative or absolute",
            file=above.name,
        )
    return name

"""Opening a chain: an image, the backing file that it names, the one that this names, and so on."""

import os.path
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cowfs.block.disk import FLUSH_INTERVAL, Disk
from cowfs.block.identity import remember, require_unchanged
from cowfs.block.image import Backing, Image
from cowfs.block.layer import Layer
from cowfs.block.merged import require_unmerged
from cowfs.block.metacache import DEFAULT_BOUND
from cowfs.block.snapshots import SnapshotKey
from cowfs.errors import Busy, CowfsError, InvalidImage, NotFound, NotPermitted, Unsupported, UsageError, blaming
from cowfs.formats.datafile import data_path
from cowfs.formats.jsonname import resolve_name
from cowfs.formats.registry import format_named, open_guessed
from cowfs.storage import (
    DEFAULT_NETWORK,
    Network,
    Storage,
    host,
    is_json_name,
    is_remote,
    local_path,
    open_storage,
    parse_address,
    shown,
)
from cowfs.storage.file import file_identity
from cowfs.storage.nbd.address import Address as NbdAddress
from cowfs.storage.nbd.address import require_absolute

#: layers; a longer chain is taken for a mistake
MAX_DEPTH = 256

_RETURN = "the chain of backing files comes back to this file"
_PROTOCOL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")

#: looks at a file's name before it is opened
Vet = Callable[[str], Awaitable[None]]
#: looks at a file once it is open, before anything of it is read
VetOpen = Callable[[Storage], None]


@dataclass(frozen=True)
class Opening:
    """How the files of a chain are opened.

    ``cache_size`` bounds the bytes of tables that each layer keeps in memory. ``vet`` is shown each file's name before
    it is opened, and ``vet_open`` the file that this has led to; both refuse it by raising. Without ``locking``, nobody
    is told that they are in use, nor asked.
    ``trusting`` takes backing files for what they were, although they have changed. ``network`` says how long servers
    are waited for. ``fleeting`` takes the first file also by a link that expires, for those who record no names. With
    ``from_here``, a relative file name inside a ``json:`` name in a header is meant from the working directory, as with
    QEMU; else, where nobody knows what that is, it is refused.
    """

    cache_size: int = DEFAULT_BOUND
    vet: Vet | None = None
    locking: bool = True
    trusting: bool = False
    network: Network = DEFAULT_NETWORK
    fleeting: bool = False
    vet_open: VetOpen | None = None
    from_here: bool = True

    async def open(self, name: str, *, writable: bool) -> Storage:
        """Open one file. Raises what opening it does, or who looks at it."""
        if self.vet is not None:
            await self.vet(local_path(name) or name)
        storage = await open_storage(
            name, writable=writable, locking=self.locking, network=self.network, fleeting=self.fleeting
        )
        try:
            if self.vet_open is not None:
                self.vet_open(storage)
        except BaseException:
            await storage.close()
            raise
        return storage


#: what there is to say if there is nothing
PLAIN = Opening()


class Source(NamedTuple):
    """A file to open as a layer, by its first bytes if no ``format`` is given; see `open_disk` for ``snapshot``."""

    name: str
    format: str | None
    snapshot: str | SnapshotKey | None = None


async def open_image(
    name: str,
    format: str | None = None,
    *,
    writable: bool = False,
    for_repair: bool = False,
    opening: Opening = PLAIN,
) -> Image:
    """Open one image, with its data file, without its backing; see `cowfs.formats.registry.Open`.

    ``for_repair`` needs ``writable``, and opens what is too damaged to be written otherwise. Errors name the file.
    """
    with blaming(name):
        name, format = resolve_name(name, format)
    storage = await opening.open(name, writable=writable)
    try:
        opener = format_named(format).open if format else open_guessed
        image = await opener(storage, cache_size=opening.cache_size, for_repair=for_repair)
        if image.data_file is not None:
            path = await host.ask(data_path, name, image.data_file, file=name)
            image.attach_data(await _open_data(name, path, opening, writable=writable))
        return image
    except CowfsError as error:
        await storage.close()
        if error.file is None:
            error.file = shown(name)
        raise
    except BaseException:
        await storage.close()
        raise


async def _open_data(image: str, path: str, opening: Opening, *, writable: bool) -> Storage:
    """Open what `data_path` has returned. Raises `CowfsError`, which names the image too."""
    try:
        return await opening.open(path, writable=writable)
    except CowfsError as error:
        error.message += f" (data file of {image})"
        raise


async def open_chain(
    name: str,
    format: str | None = None,
    *,
    writable: bool = False,
    opening: Opening = PLAIN,
) -> list[Layer]:
    """Open an image and everything below it, active layer first; only the first is opened for writing.

    Raises the first error met, after closing what was opened; a cycle is `InvalidImage`.
    """
    layers: list[Layer] = []
    seen: dict[tuple[object, ...], list[Storage]] = {}
    source: Source | None = Source(name, format)
    try:
        while source is not None:
            image = await _open_member(source, layers, opening, writable=writable and not layers)
            layers.append(Layer(image))
            for storage in image.storages:
                same = seen.setdefault(storage.identity, [])
                if any(storage.overlaps(other) for other in same):
                    raise InvalidImage(_RETURN, file=storage.name)
                same.append(storage)
            if len(layers) > MAX_DEPTH:
                raise InvalidImage(f"the chain has more than {MAX_DEPTH} layers", file=name)
            require_unmerged(layers[-1])
            source = backing_source(layers[-1].name, image.backing, opening) if image.backing else None
        if not opening.trusting:
            for above, below in pairwise(layers):
                await require_unchanged(above, below)
    except BaseException:
        for layer in layers:
            await layer.image.close_storages()
        raise
    return layers


async def _open_member(source: Source, above: list[Layer], opening: Opening, *, writable: bool) -> Image:
    try:
        return await open_image(source.name, source.format, writable=writable, opening=opening)
    except CowfsError as error:
        if isinstance(error, Busy):
            await _refuse_return(error, above)
        if above:
            error.message += f" (backing file of {above[-1].name})"
        raise


async def _refuse_return(error: Busy, above: list[Layer]) -> None:
    """Raise `InvalidImage` if what is said to be in use is in use by the very chain that leads to it."""
    if error.file is None:
        return
    identity = await host.ask(file_identity, error.file, file=error.file)
    if any(storage.identity == identity for layer in above for storage in layer.storages):
        raise InvalidImage(_RETURN, file=error.file) from error


async def open_disk(
    name: str,
    format: str | None = None,
    *,
    writable: bool = False,
    copy_on_read: bool = True,
    flush_interval: float = FLUSH_INTERVAL,
    opening: Opening = PLAIN,
    snapshot: str | SnapshotKey | None = None,
) -> Disk:
    """Open a chain as a disk. ``writable`` demands that the active layer can be written; see `open_chain`.

    ``snapshot``, a key, or a text that is an id or else a name, asks for the disk as of that internal snapshot of
    the first image, which can only be read. Raises `NotFound` if there is none.
    """
    layers = await open_chain(name, format, writable=writable, opening=opening)
    try:
        if snapshot is not None:
            await _show_snapshot(layers[0].image, snapshot)
        if writable:
            layers[0].require_writable()
        return Disk(layers, copy_on_read=copy_on_read, flush_interval=flush_interval)
    except BaseException:
        for layer in layers:
            await layer.image.close_storages()
        raise


async def remember_base(disk: Disk) -> None:
    """Have a disk that can be written remember what is below it, if it does not yet."""
    if not disk.read_only and len(disk.layers) > 1:
        await remember(disk.layers[0], disk.layers[1])


async def _show_snapshot(image: Image, snapshot: str | SnapshotKey) -> None:
    with blaming(image.storage.name):
        if isinstance(snapshot, SnapshotKey):
            found = next((entry.id for entry in await image.snapshots() if snapshot.fits(entry)), None)
            if found is None:
                raise NotFound(f"there is no snapshot with {snapshot}")
            snapshot = found
        await image.show_snapshot(snapshot)


def find_layer(layers: Sequence[Layer], name: str) -> int:
    """Return the depth of the backing file that a user means: as recorded in the image above, or as a path.

    Relative names are meant from the directory of the image above first, then from the current one.
    Raises `NotFound`.
    """
    below = [(depth, layers[depth - 1].image.backing) for depth in range(1, len(layers))]
    recorded = [depth for depth, backing in below if backing and backing.name == name]
    found = recorded + [depth for depth in named_files([layer.name for layer in layers], name) if depth]
    if not found:
        raise NotFound(f"there is no backing file '{name}' in its chain", file=layers[0].name)
    return found[0]


def named_files(files: Sequence[str], name: str) -> list[int]:
    """Return which files of a chain, active layer first, a path may mean, the likeliest first.

    A relative one is meant from the directory of the file above first, then from the current one.
    """
    beside = [depth for depth, file in enumerate(files) if _same(_beside(files[max(depth - 1, 0)], name), file)]
    here = [depth for depth, file in enumerate(files) if _same(name, file)]
    return [*beside, *here]


def _same(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _beside(file: str, name: str) -> str:
    return os.path.join(os.path.dirname(local_path(file) or ""), name)  # noqa: PTH118, PTH120


def backing_source(name: str, backing: Backing, opening: Opening = PLAIN) -> Source:
    """Return what an image's backing file name stands for: relative names lie beside the image that names them.

    Exports of NBD servers and objects have URIs, and QEMU has other names for exports and files besides. An image that
    comes from a server may not lead to files of this host: what it takes from below could go back there. Raises
    `Unsupported` for what is none of these, `NotPermitted`, or `InvalidImage` for a path in a URI that is not absolute.
    """
    text = backing.name
    if is_json_name(text):
        return _json_source(name, backing, opening)
    if is_remote(text):
        try:
            return Source(_required(text, name), backing.format)
        except (UsageError, Unsupported) as error:
            raise type(error)(f"its backing file '{shown(text)}' {error.message}", file=name) from None
    path = recorded_path(text)
    if path is None:
        protocol = text.partition(":")[0]
        raise Unsupported(f"its backing file '{text}' is no local file ('{protocol}')", file=name)
    _require_local(name, text)
    return Source(_beside(name, path), backing.format)


def _json_source(name: str, backing: Backing, opening: Opening) -> Source:
    text = backing.name
    try:
        found, format = resolve_name(text, backing.format)
    except (UsageError, Unsupported, InvalidImage) as error:
        raise type(error)(f"its backing file '{text}' {error.message}", file=name) from None
    path = local_path(found)
    if path is None:
        return Source(_required(found, name), format)
    _require_local(name, text)
    if not opening.from_here and not path.startswith("/"):
        raise InvalidImage(
            f"its backing file '{text}' is '{path}' in whatever directory a program is started in, and a mount needs an"
            " absolute path; 'cowfs rebase -u' gives it one",
            file=name,
        )
    return Source(found, format)


def _require_local(name: str, text: str) -> None:
    if is_remote(name):
        raise NotPermitted(f"comes from a server, and may not have the file '{text}' as its backing file", file=name)


def recorded_path(text: str) -> str | None:
    """Return the path that a name in a header stands for, relative ones from the image; None for any other name."""
    if is_json_name(text) or is_remote(text):
        return None
    if text.startswith("file:"):
        return text.removeprefix("file:").removeprefix("//")
    return None if _PROTOCOL.match(text) is not None else text


def _required(uri: str, file: str) -> str:
    """Check the name of a backing file on a server, and return it as it is always written."""
    address = parse_address(uri)
    if isinstance(address, NbdAddress):
        require_absolute(address, file)
    return uri if is_json_name(uri) else address.uri


def require_storable(name: str) -> None:
    """Refuse names with credentials in them, which would end up in a header; others are looked at when they are used.

    Raises what `parse_address` raises.
    """
    if not is_json_name(name) and shown(name) != name:
        parse_address(name)

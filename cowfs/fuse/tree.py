"""The tree of the mount. Nodes come into being when they are looked for; an inode number is never used twice."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from time import time_ns
from typing import Any, TypeVar

from cowfs.block.layer import Layer
from cowfs.errors import NotFound
from cowfs.fuse.control import IMAGE_FILES, MOUNT_FILES
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Mount, Served

#: as FUSE has it
ROOT_INODE = 1
CONTROL_DIRECTORY = ".cowfs"
LAYERS_DIRECTORY = "layers"


@dataclass(eq=False)
class Node:
    """A file or directory; ``served`` is the image that it belongs to. Times in nanoseconds."""

    inode: int
    served: Served | None

    def __post_init__(self) -> None:
        self.atime_ns = self.mtime_ns = self.ctime_ns = time_ns()

    def _take_time(self, layer: Layer) -> None:
        """Have the modification time of an image, so that who remembers it knows the disk again in the next mount."""
        self.mtime_ns = max(storage.modified_ns for storage in layer.storages) or self.mtime_ns


@dataclass(eq=False)
class Directory(Node):
    """Its children are asked for anew each time: all names, and what one of them stands for, if anything."""

    names: Callable[[], Iterable[str]]
    child: Callable[[str], Node | None]


@dataclass(eq=False)
class FlatFile(Node):
    """A disk as a file."""

    served: Served

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_time(self.served.disk.layers[0])
        self._writes, self._discards = self._count()

    def _count(self) -> tuple[int, int]:
        stats = self.served.disk.stats
        return stats.writes, stats.discards

    def follow_changes(self) -> None:
        """If guests have written, times move to when the active layer's file was; for discards nothing is, at first.

        Whatever jobs write, which is no change of the disk, does not move them.
        """
        writes, discards = self._count()
        if discards != self._discards:
            self.touch()
        elif writes != self._writes:
            self._take_time(self.served.disk.layers[0])
            self.ctime_ns = self.mtime_ns
        self._writes, self._discards = writes, discards

    def touch(self) -> None:
        """It changes now."""
        self.mtime_ns = self.ctime_ns = time_ns()


@dataclass(eq=False)
class LayerFile(Node):
    """A disk as it is seen from one of its layers."""

    served: Served
    layer: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_time(self.layer)


@dataclass(eq=False)
class ControlNode(Node):
    """A control file of the mount or of an image, ``subject``."""

    file: ControlFile[Any]
    subject: Any


N = TypeVar("N", bound=Node)


class Tree:
    """All nodes of a mount by inode number."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._nodes: dict[int, Node] = {}
        self._by_key: dict[Hashable, Node] = {}
        self._keys: dict[Served, list[Hashable]] = {}
        self._last = ROOT_INODE - 1
        self.root = self._node("/", Directory, None, self._root_names, self._root_child)
        self.control = self._node(CONTROL_DIRECTORY, Directory, None, self._control_names, self._control_child)

    def _node(self, key: Hashable, make: Callable[..., N], *args: Any) -> N:
        node = self._by_key.get(key)
        if node is None:
            self._last += 1
            node = self._by_key[key] = self._nodes[self._last] = make(self._last, *args)
            if node.served is not None:
                self._keys.setdefault(node.served, []).append(key)
        return node  # type: ignore[return-value]

    def __getitem__(self, inode: int) -> Node:
        """Return the node of a number; `NotFound` if it belonged to an image that is gone."""
        try:
            return self._nodes[inode]
        except KeyError:
            raise NotFound("this disk is no longer part of the mount") from None

    def get(self, inode: int) -> Node | None:
        """Return the node of a number, if there is one."""
        return self._nodes.get(inode)

    def flat(self, served: Served) -> FlatFile:
        """Return the node of an image's flat file."""
        return self._node((served, "flat"), FlatFile, served)

    def find(self, parent: int, name: str) -> Node | None:
        """Return a directory's child."""
        node = self[parent]
        if name in (".", ".."):
            return node if name == "." else self._parent(node)
        assert isinstance(node, Directory)
        return node.child(name)

    def children(self, node: Node) -> Iterator[tuple[str, Node]]:
        """Names and nodes in a directory."""
        assert isinstance(node, Directory)
        for name in list(node.names()):
            child = node.child(name)
            if child is not None:
                yield name, child

    def forget(self, served: Served) -> None:
        """Drop the nodes of an image that is taken out."""
        for key in self._keys.pop(served, ()):
            del self._nodes[self._by_key.pop(key).inode]

    def _parent(self, node: Node) -> Node:
        if node.served is None:
            return self.root
        directory = self._image_directory(node.served)
        return self.control if node is directory else directory

    # -- what there is

    def _root_names(self) -> Iterable[str]:
        return (CONTROL_DIRECTORY, *self._mount.images)

    def _root_child(self, name: str) -> Node | None:
        if name == CONTROL_DIRECTORY:
            return self.control
        served = self._mount.images.get(name)
        return None if served is None else self.flat(served)

    def _control_names(self) -> Iterable[str]:
        return (*MOUNT_FILES, *self._mount.images)

    def _control_child(self, name: str) -> Node | None:
        if (file := MOUNT_FILES.get(name)) is not None:
            return self._node((self._mount, name), ControlNode, None, file, self._mount)
        served = self._mount.images.get(name)
        return None if served is None else self._image_directory(served)

    def _image_directory(self, served: Served) -> Directory:
        names = (*IMAGE_FILES, LAYERS_DIRECTORY)
        child = partial(self._image_child, served)
        return self._node((served, "directory"), Directory, served, lambda: names, child)

    def _image_child(self, served: Served, name: str) -> Node | None:
        if (file := IMAGE_FILES.get(name)) is not None:
            return self._node((served, name), ControlNode, served, file, served)
        if name != LAYERS_DIRECTORY:
            return None
        child = partial(self._layer, served)
        return self._node((served, name), Directory, served, lambda: map(str, range(len(served.disk.layers))), child)

    def _layer(self, served: Served, name: str) -> Node | None:
        layer = dict(zip(map(str, count()), reversed(served.disk.layers), strict=False)).get(name)
        return None if layer is None else self._node((served, layer), LayerFile, served, layer)

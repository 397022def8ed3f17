"""The tree of the mount. Nodes come into being when they are looked for; an inode number is never used twice."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
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
    """Its children are asked for anew each time."""

    children: Callable[[], Iterator[tuple[str, Node]]]


@dataclass(eq=False)
class FlatFile(Node):
    """A disk as a file."""

    served: Served

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_time(self.served.disk.layers[0])


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
        self._last = ROOT_INODE - 1
        self.root = self._node("/", Directory, None, self._root_children)
        self.control = self._node(CONTROL_DIRECTORY, Directory, None, self._control_children)

    def _node(self, key: Hashable, make: Callable[..., N], *args: Any) -> N:
        node = self._by_key.get(key)
        if node is None:
            self._last += 1
            node = self._by_key[key] = self._nodes[self._last] = make(self._last, *args)
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
        return next((child for known, child in self.children(node) if known == name), None)

    def children(self, node: Node) -> Iterator[tuple[str, Node]]:
        """Names and nodes in a directory."""
        assert isinstance(node, Directory)
        return node.children()

    def forget(self, served: Served) -> None:
        """Drop the nodes of an image that is taken out."""
        for key, node in list(self._by_key.items()):
            if node.served is served:
                del self._by_key[key], self._nodes[node.inode]

    def _parent(self, node: Node) -> Node:
        if node.served is None:
            return self.root
        directory = self._image_directory(node.served)
        return self.control if node is directory else directory

    # -- what there is

    def _root_children(self) -> Iterator[tuple[str, Node]]:
        yield CONTROL_DIRECTORY, self.control
        for name, served in list(self._mount.images.items()):
            yield name, self.flat(served)

    def _control_children(self) -> Iterator[tuple[str, Node]]:
        for name, file in MOUNT_FILES.items():
            yield name, self._node((self._mount, name), ControlNode, None, file, self._mount)
        for name, served in list(self._mount.images.items()):
            yield name, self._image_directory(served)

    def _image_directory(self, served: Served) -> Directory:
        return self._node((served, "directory"), Directory, served, lambda: self._image_children(served))

    def _image_children(self, served: Served) -> Iterator[tuple[str, Node]]:
        for name, file in IMAGE_FILES.items():
            yield name, self._node((served, name), ControlNode, served, file, served)
        yield (
            LAYERS_DIRECTORY,
            self._node((served, LAYERS_DIRECTORY), Directory, served, lambda: self._layers(served)),
        )

    def _layers(self, served: Served) -> Iterator[tuple[str, Node]]:
        for number, layer in enumerate(reversed(served.disk.layers)):
            yield str(number), self._node((served, layer), LayerFile, served, layer)

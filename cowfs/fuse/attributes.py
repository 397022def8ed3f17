"""What stat(2) shows of a node."""

import os
import stat
from functools import singledispatchmethod

import pyfuse3

from cowfs.fuse.options import Settings
from cowfs.fuse.tree import ControlNode, Directory, FlatFile, LayerFile, Node

#: seconds for which the kernel may rely on attributes and names; sizes change only through the kernel itself
TIMEOUT = 1.0
#: the same for the attributes of flat files. Where requests overlap, the kernel takes what it hears of attributes for
#: outdated: once they had expired, it would ask before each request, in vain. Looking up the name brings new ones.
FLAT_TIMEOUT = 1e6


class Attributes:
    """Makes the attributes of nodes, in accordance with the mount's options."""

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.mode
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid

    def of(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return everything about a node."""
        if isinstance(node, FlatFile):
            node.follow_changes()
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = node.atime_ns, node.mtime_ns, node.ctime_ns
        entry.entry_timeout = entry.attr_timeout = TIMEOUT
        self._fill(node, entry)
        return entry

    @singledispatchmethod
    def _fill(self, node: Node, entry: pyfuse3.EntryAttributes) -> None:
        raise AssertionError(f"no attributes for {node}")

    @_fill.register
    def _(self, node: Directory, entry: pyfuse3.EntryAttributes) -> None:
        # whoever may read files may list and enter directories
        entry.st_mode = stat.S_IFDIR | self._mode & 0o444 | (self._mode & 0o444) >> 2 | 0o500
        entry.st_nlink = 2

    @_fill.register
    def _(self, node: FlatFile, entry: pyfuse3.EntryAttributes) -> None:
        disk = node.served.disk
        entry.attr_timeout = FLAT_TIMEOUT
        entry.st_mode = stat.S_IFREG | (self._mode & 0o555 if disk.read_only else self._mode)
        entry.st_size = disk.size
        entry.st_blocks = sum(storage.allocated for layer in disk.layers for storage in layer.storages) // 512

    @_fill.register
    def _(self, node: LayerFile, entry: pyfuse3.EntryAttributes) -> None:
        layers = node.served.disk.layers
        below = layers[layers.index(node.layer) :] if node.layer in layers else ()
        entry.st_mode = stat.S_IFREG | self._mode & 0o444
        # jobs change the numbers that layers have
        entry.entry_timeout = 0
        entry.st_size = node.layer.size
        entry.st_blocks = sum(storage.allocated for layer in below for storage in layer.storages) // 512

    @_fill.register
    def _(self, node: ControlNode, entry: pyfuse3.EntryAttributes) -> None:
        permissions = self._mode & (0o444 if node.file.command is None else 0o666)
        if node.served is None and node.file.command is not None:
            # it has the server open any file by its name: for no one but who mounted, whoever may use the disks
            permissions = 0o600
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_mode = stat.S_IFREG | permissions
        entry.attr_timeout = 0

"""qcow2, versions 2 and 3."""

from cowfs.formats.qcow2.create import OPTIONS, create
from cowfs.formats.qcow2.measure import measure
from cowfs.formats.qcow2.opening import open_image, probe

__all__ = ["OPTIONS", "create", "measure", "open_image", "probe"]

"""qcow2, versions 2 and 3."""

from cowfs.formats.qcow2.create import OPTIONS, create
from cowfs.formats.qcow2.measure import measure
from cowfs.formats.qcow2.opening import DEVICE_OPTIONS, open_image, probe

__all__ = ["DEVICE_OPTIONS", "OPTIONS", "create", "measure", "open_image", "probe"]

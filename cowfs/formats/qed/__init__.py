"""QED, QEMU's enhanced disk format."""

from cowfs.formats.qed.create import OPTIONS, create
from cowfs.formats.qed.image import open_image, probe

__all__ = ["OPTIONS", "create", "open_image", "probe"]

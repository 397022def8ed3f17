"""QED, QEMU's enhanced disk format."""

from cowfs.formats.qed.create import OPTIONS, create
from cowfs.formats.qed.image import open_image, probe
from cowfs.formats.qed.measure import measure

__all__ = ["OPTIONS", "create", "measure", "open_image", "probe"]

"""cowfs: chains of copy-on-write disk images, presented as flat files."""

__version__ = "0.1.0"

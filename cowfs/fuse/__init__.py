"""The mount. Before anything in here imports pyfuse3, the requests that it lacks are put in its way."""

from cowfs.fuse import shim

shim.load()

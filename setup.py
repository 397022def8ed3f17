"""What setup.cfg has no words for: the object that is put in pyfuse3's way, see cowfs/fuse/shim."""

from setuptools import Extension, setup

# no module, in spite of its name; mounts work without it, so a machine that cannot build it may go on
setup(ext_modules=[Extension("cowfs.fuse.shim.interpose", ["cowfs/fuse/shim/interpose.c"], optional=True)])

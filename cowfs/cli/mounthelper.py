"""``mount.cowfs``: what mount(8) runs for ``mount -t cowfs``, from the command line, fstab, or a systemd unit.

For ``mount -t fuse.cowfs`` mount(8) goes through mount.fuse3(8), which runs ``cowfs`` itself.
"""

import getopt
import sys
from collections.abc import Sequence

from cowfs.cli.main import INTERRUPTED
from cowfs.cli.main import main as run
from cowfs.cli.streams import prepare, tell

#: exit codes of mount(8)
_USAGE, _USER_INTERRUPT, _FAILURE = 1, 8, 32

_CODES = {0: 0, 2: _USAGE, INTERRUPTED: _USER_INTERRUPT}


def main(args: Sequence[str] | None = None) -> int:
    """Mount as ``IMAGE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`` says; an exit code of mount(8)."""
    try:
        options, words = getopt.gnu_getopt(list(sys.argv[1:] if args is None else args), "sfnvN:o:t:")
    except getopt.GetoptError as error:
        return _refuse(error.msg)
    if len(words) != 2:
        return _refuse("usage: mount.cowfs IMAGE MOUNTPOINT [-o OPTION,...]")
    given = [name for name, _ in options]
    if "-N" in given:
        return _refuse("cannot mount in another namespace; use nsenter(1)")
    if "-f" in given:
        # mount(8) asks for everything but the mount
        return 0
    settings = [word for name, value in options if name == "-o" for word in ("-o", value)]
    code = run(["mount", *settings, "--", *words])
    return _CODES.get(code, _FAILURE)


def _refuse(sentence: str) -> int:
    prepare()
    tell(f"mount.cowfs: {sentence}", err=True)
    return _USAGE

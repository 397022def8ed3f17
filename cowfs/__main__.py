"""``python -m cowfs``: the same as the ``cowfs`` command."""

import sys

from cowfs.cli.main import main

sys.exit(main())

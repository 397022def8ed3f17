"""Where a server's messages go."""

import logging
import logging.handlers
from pathlib import Path

from cowfs.errors import StorageError

_SYSLOG = "/dev/log"


def start_logging(file: str | None, *, foreground: bool) -> None:
    """Log to ``file``; without one to the terminal in the foreground, else to syslog where there is one.

    Raises `StorageError` if the file cannot be opened.
    """
    handler: logging.Handler
    layout = "cowfs[%(process)d]: %(levelname)s: %(message)s"
    if file is not None:
        try:
            handler = logging.FileHandler(file, errors="surrogateescape")
        except OSError as error:
            raise StorageError.from_os(error, file=file, doing="cannot open the log") from error
        layout = f"%(asctime)s {layout}"
    elif foreground:
        handler = logging.StreamHandler()
        layout = "cowfs: %(message)s"
    elif Path(_SYSLOG).exists():
        handler = logging.handlers.SysLogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    else:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(layout))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)

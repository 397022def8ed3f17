"""Modules that take long to import, for those who use them seldom: a command or a mount should not begin by waiting.

Where they are used, `typing.TYPE_CHECKING` tells their real names to type checkers; annotations are not evaluated.
"""

import importlib
from typing import Any


class LazyModule:
    """A module that is imported when something of it is first used, by whatever thread."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self._name), name)
        # so that it is an ordinary attribute from now on
        setattr(self, name, found)
        return found


#: a quarter of the time that a mount takes to be there, and used where whole tables are scanned
np = LazyModule("numpy")

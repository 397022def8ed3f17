"""Standard input, output and error: there from the start, and what happens where they take nothing.

What a command was asked for (facts, tables, a device's name) is written with ``click.echo``; if that fails, so does the
command. What it merely mentions of work that is done is written with `tell`, and no command fails because of it.
"""

import io
import os
import sys
from typing import Any

import click


class _Output(io.FileIO):
    """Standard output: its errors say so, and after the first what is still buffered is dropped."""

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            discard(self.fileno())
            error.filename = "standard output"
            raise


def prepare() -> None:
    """Put something in place of standard streams that are closed; else a file that is opened next would become one.

    Output to it fails as it does on a closed descriptor; standard error takes everything, as nobody would see more.
    Names that are no text in this locale come out of standard output as they went in.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free, which is this one
            os.open(os.devnull, flags)
            os.set_inheritable(number, True)
    # not if somebody has put something of his own there
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        encoding = None if sys.stdout is None else sys.stdout.encoding
        output = io.BufferedWriter(_Output(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(output, encoding, "surrogateescape", line_buffering=os.isatty(1))
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115


def tell(text: str = "", *, newline: bool = True, err: bool = False) -> None:
    """Print what nobody depends on; where it cannot be printed, it and all that follows is dropped."""
    try:
        click.echo(text, nl=newline, err=err)
    except OSError:
        discard(2 if err else 1)


def discard(number: int) -> None:
    """Give what is still buffered for a standard stream a place to go, so that nothing fails on it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)

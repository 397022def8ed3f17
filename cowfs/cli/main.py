"""The ``cowfs`` command: finds the subcommand, and turns whatever goes wrong into one line and an exit code.

A subcommand ``NAME`` is the `click.Command` called ``command`` in the module ``cowfs.cli.NAME``, imported only
when it is asked for: ``cowfs --help`` should not wait for what only ``mount`` needs. A command returns its exit
code, or nothing for 0.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import click

from cowfs import __version__
from cowfs.cli.streams import discard, prepare, tell
from cowfs.errors import CowfsError, first_error

#: exit code after Ctrl-C, as shells report it
INTERRUPTED = 130


class Entry(NamedTuple):
    """One subcommand: its line in the list of commands, and its exit codes where something goes wrong.

    ``failure`` says that the command could not do its work, ``usage`` that it was called wrongly. They differ
    from the default where that number already has a meaning among the command's results.
    """

    summary: str
    failure: int = 1
    usage: int = 2


COMMANDS = {
    "create": Entry("Make a new disk image."),
    "info": Entry("Show what an image is: format, sizes, features, backing files."),
    "check": Entry("Look for damage and leaks in an image.", usage=1),
    "map": Entry("Show which parts of a disk lie where in which file."),
    "compare": Entry("Tell whether two images hold the same disk.", failure=2),
    "convert": Entry("Copy disks into an image of any format.", usage=1),
    "rebase": Entry("Put an overlay onto another backing file.", usage=1),
    "measure": Entry("Tell how large an image would be.", usage=1),
    "verify": Entry("Tell whether the backing files of an image are what they were.", failure=2),
    "resize": Entry("Change the size of a disk."),
    "snapshot": Entry("List, make, apply and delete the snapshots inside an image."),
    "mount": Entry("Show chains of images as flat files in a directory."),
    "umount": Entry("Flush and take a mount away."),
    "add": Entry("Show more images in a mount."),
    "remove": Entry("Take disks out of a mount."),
    "status": Entry("Show what is mounted: chains and jobs."),
    "stream": Entry("Copy what the backing files hold into the active image."),
    "commit": Entry("Merge an image into its backing file."),
    "job": Entry("Watch and steer the jobs of mounted disks."),
    "attach": Entry("Make a mounted disk a loop device."),
    "detach": Entry("Take the loop device of a mounted disk away."),
}
_UNKNOWN = Entry("")


class _Commands(click.Group):
    """A group that knows its commands by name and imports the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"cowfs.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def group() -> None:
    """Show chains of copy-on-write disk images as flat files, and work on such images.

    The image commands are those of qemu-img. 'cowfs COMMAND --help' explains one; the manual is cowfs(1).

    \b
    Example:
      cowfs create -f qcow2 -b base.qcow2 -F qcow2 vm1.qcow2
      cowfs mount vm1.qcow2 /mnt/disks
      cowfs stream /mnt/disks/vm1
      cowfs umount /mnt/disks
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process by default; the exit code."""
    prepare()
    arguments = _from_mount_helper(list(sys.argv[1:] if args is None else args))
    entry = COMMANDS.get(next((word for word in arguments if not word.startswith("-")), ""), _UNKNOWN)
    try:
        code = _invoke(arguments)
        _flush_output()
        return code
    except click.UsageError as error:
        _complain(_usage_text(error))
        return entry.usage
    except BaseException as error:  # noqa: BLE001
        return _report(first_error(error), entry)


def _from_mount_helper(args: list[str]) -> list[str]:
    """Recognise the order in which mount(8) calls a helper, ``IMAGE MOUNTPOINT -o OPTIONS``."""
    if len(args) > 3 and args[0] not in COMMANDS and not args[0].startswith("-") and "-o" in args[2:]:
        return ["mount", *args]
    return args


def _invoke(args: list[str]) -> int:
    try:
        with group.make_context("cowfs", args) as context:
            result = group.invoke(context)
    except click.exceptions.Exit as request:
        return request.exit_code
    return result if isinstance(result, int) else 0


def _report(error: BaseException, entry: Entry) -> int:
    """Say in one line what ended the command; its exit code."""
    if isinstance(error, (SystemExit, GeneratorExit)):
        raise error
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        discard(1)
    elif isinstance(error, CowfsError):
        _complain(str(error))
    elif isinstance(error, click.ClickException):
        _complain(error.format_message())
    elif isinstance(error, OSError):
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    else:
        _complain(f"this is a bug in cowfs (COWFS_DEBUG=1 shows where): {type(error).__name__}: {error}")
        if os.environ.get("COWFS_DEBUG") == "1":
            traceback.print_exception(error)
    return entry.failure


def _usage_text(error: click.UsageError) -> str:
    text = error.format_message().rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "cowfs"
    return f"{text[:1].lower()}{text[1:]}; see '{path} --help'"


def _complain(text: str) -> None:
    """Print one line on standard error, whatever a file's name is made of: odd characters, or credentials."""
    # which nobody needs who has no complaint
    from cowfs.storage.remote.address import without_credentials

    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in without_credentials(text))
    tell(f"cowfs: {line}", err=True)


def _flush_output() -> None:
    """Meet errors of standard output here: the interpreter would print a traceback at exit."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError as error:
            discard(sys.stdout.fileno())
            error.filename = "standard output"
            raise

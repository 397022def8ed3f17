import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import click
import pytest
import trio
from commandline import cowfs, ok, refusal

from cowfs import __version__
from cowfs.cli import main as main_module
from cowfs.cli.main import COMMANDS, main
from cowfs.errors import CowfsError, NotFound

Fail = Callable[[BaseException], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make ``info`` and ``compare`` raise an error."""

    def make(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        module = ModuleType("stand-in")
        module.command = command  # type: ignore[attr-defined]
        for name in ("info", "check", "compare"):
            monkeypatch.setitem(sys.modules, f"cowfs.cli.{name}", module)

    return make


def test_help_lists_every_command() -> None:
    lines = ok(cowfs("--help")).splitlines()
    width = max(map(len, COMMANDS))
    for name, entry in COMMANDS.items():
        assert f"  {name:<{width}}  {entry.summary}" in lines


def test_version() -> None:
    assert ok(cowfs("--version")) == f"cowfs {__version__}\n"


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from cowfs.cli.main import main; main(['--help']); main(['--version']);"
        "print(sorted({'trio', 'pyfuse3', 'numpy', 'rich', 'zstandard'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("bogus",),
        ("--bogus",),
        ("info",),
        ("info", "--bogus", "x"),
        ("info", "--output=xml", "x"),
        ("map", "a", "b"),
    ],
)
def test_wrong_usage_is_one_line(args: tuple[str, ...]) -> None:
    assert "--help" in refusal(cowfs(*args), 2)


def test_wrong_usage_of_check_is_not_its_code_for_corrupt() -> None:
    refusal(cowfs("check"), 1)


def test_the_order_of_a_mount_helper_is_a_mount() -> None:
    assert refusal(cowfs("/no/such/image", "/no/such/mountpoint", "-o", "ro")).startswith("/no/such/")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NotFound("is not there", file="x.raw"), "x.raw: is not there"),
        (NotFound("is not there", file="a\nb\x1b"), "a\\nb\\x1b: is not there"),
        (CowfsError("no file is at fault"), "no file is at fault"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_an_error_is_one_line(fail: Fail, capsys: pytest.CaptureFixture[str], error: BaseException, line: str) -> None:
    fail(error)
    assert main(["info"]) == 1
    assert capsys.readouterr() == ("", f"cowfs: {line}\n")


def test_an_error_is_found_inside_a_nursery_group(capsys: pytest.CaptureFixture[str], fail: Fail) -> None:
    async def refuse() -> None:
        raise NotFound("is not there", file="x")

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)

    with pytest.RaisesGroup(NotFound) as caught:
        trio.run(work)
    fail(caught.value)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "cowfs: x: is not there\n"


def test_failures_have_codes_that_mean_nothing_else(fail: Fail) -> None:
    fail(NotFound("is not there"))
    assert (main(["info"]), main(["check"]), main(["compare"])) == (1, 1, 2)


def test_ctrl_c_is_quiet(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(KeyboardInterrupt())
    assert main(["info"]) == main_module.INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_a_bug_says_so_and_shows_its_traceback_only_on_demand(
    fail: Fail, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(ZeroDivisionError("division by zero"))
    monkeypatch.delenv("COWFS_DEBUG", raising=False)
    assert main(["info"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "bug" in line
    assert "ZeroDivisionError: division by zero" in line
    monkeypatch.setenv("COWFS_DEBUG", "1")
    assert main(["info"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error_to_talk_about() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        result = subprocess.run(
            [sys.executable, "-m", "cowfs", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, result.stderr) == (1, "")


def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "cowfs", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, result.stderr) == (1, "cowfs: standard output: No space left on device\n")

"""Going to the background. Each case forks in an interpreter of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from mounting import wait_for

_PROGRAM = """
import logging, os, sys
from cowfs.errors import CowfsError
from cowfs.fuse.daemon import in_background
logging.basicConfig(handlers=[logging.NullHandler()])
def serve(ready):
    print("the server speaks", flush=True)
{body}
try:
    in_background(serve)
    print("mounted")
except CowfsError as error:
    print("error:", error)
"""


def run(body: str) -> list[str]:
    """What is printed until the command and the server have let go of the output."""
    program = _PROGRAM.format(body="\n".join("    " + line for line in body.splitlines()))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_ready() -> None:
    assert run("ready()\nprint('never seen')\nreturn 0") == ["the server speaks", "mounted"]


def test_the_server_has_a_session_and_a_directory_of_its_own() -> None:
    lines = run("print(os.getsid(0) != int(sys.argv[1] if sys.argv[1:] else 0), os.getcwd(), flush=True)\nready()")
    assert lines[1] == "True /"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise CowfsError('is broken', file='/images/a')", "/images/a: is broken"),
        ("raise KeyError('bug')", "internal error: KeyError: 'bug'"),
        ("os._exit(3)", "the server died before its mount was ready"),
    ],
)
def test_failure(body: str, sentence: str) -> None:
    assert run(body) == ["the server speaks", f"error: {sentence}"]


def test_an_interrupted_command_is_noticed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    body = f"""
    sys.stdin.readline()
    try:
        ready()
    except BrokenPipeError:
        open({str(told)!r}, "w").close()"""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(body=body)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"the server speaks\n"
    process.kill()
    process.wait()
    process.stdin.write(b"go on\n")
    process.stdin.close()
    wait_for("the server to notice", told.exists)
    process.stdout.close()

"""Going to the background. Each case forks in an interpreter of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import PATIENCE
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
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_ready() -> None:
    assert run("ready()\nprint('never seen')\nreturn 0") == ["the server speaks", "mounted"]


def test_the_server_has_a_session_and_a_directory_of_its_own_once_it_is_ready(tmp_path: Path) -> None:
    """Until then it is in the group of the command: an automount lets nobody else near the mount point."""
    told = tmp_path / "told"
    body = f"""
    before = os.getpgrp() == int(os.environ["GROUP"]), os.getsid(0) == os.getpid()
    ready()
    open({str(told)!r}, "w").write(f"{{before}} {{os.getsid(0) == os.getpid()}} {{os.getcwd()}}\\n")"""
    program = "import os; os.environ['GROUP'] = str(os.getpgrp())\n" + _PROGRAM.format(body=body)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.stdout.splitlines()[-1] == "mounted", result
    wait_for("the server to tell", lambda: told.exists() and told.read_text().endswith("\n"))
    assert told.read_text() == "(True, False) True /\n"


def test_what_the_terminal_sends_meanwhile_ends_the_command_alone(tmp_path: Path) -> None:
    told = tmp_path / "told"
    body = f"""
    sys.stdin.readline()
    try:
        ready()
    except BrokenPipeError:
        open({str(told)!r}, "w").close()"""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(body=body)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"the server speaks\n"
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    process.stdin.write(b"go on\n")
    process.stdin.close()
    wait_for("the server to notice", told.exists)
    process.stdout.close()


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

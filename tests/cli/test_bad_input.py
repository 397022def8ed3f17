"""Whatever is wrong with a file: one line that names it, no traceback, nothing changed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, refusal

_COMMANDS = {
    "info": (["info"], 1),
    "chain": (["info", "--backing-chain"], 1),
    "check": (["check"], 1),
    "map": (["map"], 1),
    "compare": (["compare", "other.raw"], 2),
}
#: commands that open what is below
_WHOLE_CHAIN = ("chain", "map", "compare")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "good.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "other.raw").write_bytes(bytes(1 << 20))
    return tmp_path


def _missing(here: Path) -> str:
    return "No such file"


def _directory(here: Path) -> str:
    (here / "bad").mkdir()
    return "directory"


def _fifo(here: Path) -> str:
    os.mkfifo(here / "bad")
    return "neither a regular file nor a block device"


def _qcow2_cut_short(here: Path) -> str:
    _create(here, "-f", "qcow2", "bad", "1M")
    os.truncate(here / "bad", 60)
    return "bad: "


def _qed_cut_short(here: Path) -> str:
    _create(here, "-f", "qed", "bad", "1M")
    os.truncate(here / "bad", 30)
    return "bad: "


def _qcow2_of_the_future(here: Path) -> str:
    _create(here, "-f", "qcow2", "bad", "1M")
    _patch(here, 72, b"\x80")
    return "bad: "


def _qed_of_the_future(here: Path) -> str:
    _create(here, "-f", "qed", "bad", "1M")
    _patch(here, 16, b"\x80")
    return "bad: "


def _qcow2_with_a_huge_table(here: Path) -> str:
    _create(here, "-f", "qcow2", "bad", "1M")
    _patch(here, 36, b"\xff\xff\xff\xff")
    return "bad: "


_ANY: list[Callable[[Path], str]] = [
    _missing,
    _directory,
    _fifo,
    _qcow2_cut_short,
    _qed_cut_short,
    _qcow2_of_the_future,
    _qed_of_the_future,
    _qcow2_with_a_huge_table,
]


def _backing_gone(here: Path) -> str:
    _create(here, "-f", "qcow2", "-b", "good.raw", "-F", "raw", "bad")
    (here / "good.raw").unlink()
    return "good.raw: cannot open: No such file or directory (backing file of bad)"


def _cycle(here: Path) -> str:
    _create(here, "-f", "qcow2", "-b", "good.raw", "-F", "raw", "bad")
    _create(here, "-f", "qed", "-b", "bad", "-F", "qcow2", "other")
    ok(qemu_img("rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "qed", "bad", cwd=here))
    return "comes back to this file"


def _backing_of_another_format(here: Path) -> str:
    ok(qemu_img("create", "-u", "-f", "qcow2", "-b", "good.raw", "-F", "qed", "bad", "1M", cwd=here))
    return "good.raw: "


def _backing_in_the_network(here: Path) -> str:
    ok(qemu_img("create", "-u", "-f", "qcow2", "-b", "nbd://localhost/x", "-F", "raw", "bad", "1M", cwd=here))
    return "nbd://localhost/x: cannot connect: Connection refused (backing file of bad)"


def _backing_of_no_known_kind(here: Path) -> str:
    ok(qemu_img("create", "-u", "-f", "qcow2", "-b", "gluster://host/x", "-F", "raw", "bad", "1M", cwd=here))
    return "no local file"


_CHAIN: list[Callable[[Path], str]] = [
    _backing_gone,
    _cycle,
    _backing_of_another_format,
    _backing_in_the_network,
    _backing_of_no_known_kind,
]


def _create(here: Path, *args: str) -> None:
    ok(qemu_img("create", *args, cwd=here))


def _patch(here: Path, offset: int, data: bytes) -> None:
    with (here / "bad").open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _contents(here: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", _COMMANDS)
@pytest.mark.parametrize("make", _ANY)
def test_a_bad_file_is_one_line(here: Path, name: str, make: Callable[[Path], str]) -> None:
    says = make(here)
    before = _contents(here)
    command, code = _COMMANDS[name]
    line = refusal(cowfs(*command, "bad", cwd=here), code)
    assert line.startswith("bad: ")
    assert says in line
    assert _contents(here) == before


@pytest.mark.parametrize("name", _WHOLE_CHAIN)
@pytest.mark.parametrize("make", _CHAIN)
def test_a_bad_chain_is_one_line(here: Path, name: str, make: Callable[[Path], str]) -> None:
    says = make(here)
    before = _contents(here)
    command, code = _COMMANDS[name]
    assert says in refusal(cowfs(*command, "bad", cwd=here), code)
    assert _contents(here) == before


def test_a_chain_that_is_not_asked_for_is_not_looked_at(here: Path) -> None:
    _backing_gone(here)
    assert "backing file: good.raw\n" in ok(cowfs("info", "bad", cwd=here))
    ok(cowfs("check", "bad", cwd=here))


#: as root, drop what overrides permissions
_UNPRIVILEGED = ("setpriv", "--reuid=65534", "--clear-groups") if os.geteuid() == 0 else ()


def _let_others_in(here: Path) -> None:
    """Open the way to a test's directory, which pytest keeps to its user."""
    for path in (here, *here.parents):
        if path.owner() == here.owner() and not path.stat().st_mode & 0o1:
            path.chmod(path.stat().st_mode | 0o711)


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_file_that_may_not_be_read(here: Path, name: str) -> None:
    command, code = _COMMANDS[name]
    (here / "bad").write_bytes(b"")
    (here / "bad").chmod(0)
    _let_others_in(here)
    result = cowfs(*command, "bad", cwd=here, prefix=_UNPRIVILEGED)
    assert "bad: cannot open: Permission denied" in refusal(result, code)


def test_a_directory_that_may_not_be_written(here: Path) -> None:
    _let_others_in(here)
    here.chmod(0o555)
    before = _contents(here)
    result = cowfs("create", "new", "1M", cwd=here, prefix=_UNPRIVILEGED)
    assert "new: cannot create: Permission denied" in refusal(result)
    assert _contents(here) == before


@pytest.mark.parametrize("name", _COMMANDS)
def test_formats_that_do_not_exist(here: Path, name: str) -> None:
    command, code = _COMMANDS[name]
    option = "-F" if name == "compare" else "-f"
    line = refusal(cowfs(command[0], option, "vmdk", *command[1:], "good.raw", cwd=here), code)
    assert "unknown format 'vmdk'" in line

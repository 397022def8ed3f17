"""The documents say what the program does: commands, options, creation options, mount options, both ways."""

import re
import subprocess
from importlib import import_module
from pathlib import Path

import click
import pytest
from crashkinds import HELD, KINDS

from cowfs import __version__
from cowfs.cli.main import COMMANDS, group
from cowfs.formats.registry import FORMATS
from cowfs.fuse.options import SWITCHES, VALUES

_ROOT = Path(__file__).parent.parent
_PAGES = sorted((_ROOT / "man").glob("*.[1-9]"))
_PROSE = sorted([*_ROOT.glob("*.rst"), *(_ROOT / "docs").glob("*.rst")])

Section = dict[str, list[str]]


def _sections(page: Path) -> dict[str, Section]:
    """Return headings of a page, under each its subheadings ("" before the first), with the tagged terms there."""
    sections: dict[str, Section] = {}
    section: Section = {}
    terms: list[str] = []
    lines = iter(page.read_text().splitlines())
    for line in lines:
        if line.startswith(".SH "):
            terms = []
            section = sections.setdefault(line[4:], {"": terms})
        elif line.startswith(".SS "):
            terms = section.setdefault(line[4:], [])
        elif line == ".TP":
            terms.append(_plain(next(lines)))
    return sections


def _plain(line: str) -> str:
    """Take fonts and escapes out of a line of groff."""
    line = re.sub(r"^\.[BI]+ ", "", line)
    return re.sub(r"\\f[A-Z]", "", line).replace(r"\-", "-")


def _options(terms: list[str]) -> set[str]:
    return {option for term in terms for option in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", term)}


def _declared(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


_MANUAL = _sections(_ROOT / "man" / "cowfs.1")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_manual_has_every_option_of_a_command_and_no_other(name: str) -> None:
    terms = next(section[name] for heading, section in _MANUAL.items() if name in section and "CREATION" not in heading)
    assert _options(terms) == _declared(import_module(f"cowfs.cli.{name}").command)


def test_the_manual_has_every_command_and_no_other() -> None:
    headings = {name for title, section in _MANUAL.items() if "OPTIONS" not in title for name in section}
    assert headings - {""} == set(COMMANDS)


def test_the_manual_has_the_options_of_cowfs_itself() -> None:
    assert _options(_MANUAL["OPTIONS"][""]) == _declared(group) | {"-h", "--help"}


def test_the_manual_has_every_mount_option_and_no_other() -> None:
    terms = {name for term in _MANUAL["MOUNT OPTIONS"][""] for name in re.findall(r"[a-z_-]+(?=[=,]|$)", term)}
    assert terms == {*SWITCHES, *VALUES}


def test_the_manual_has_every_creation_option_and_no_other() -> None:
    section = _MANUAL["CREATION OPTIONS"]
    assert set(section) - {""} == set(FORMATS)
    for name, format in FORMATS.items():
        assert {word for term in section[name] for word in re.findall(r"(\w+)=", term)} == set(format.options)


def test_the_manual_is_that_of_this_version() -> None:
    for page in _PAGES:
        assert f'"cowfs {__version__}"' in page.read_text()


@pytest.mark.parametrize("page", _PAGES, ids=[page.name for page in _PAGES])
@pytest.mark.parametrize(
    "command", [["man", "--warnings", "-l"], ["groff", "-man", "-Tutf8", "-ww", "-z"]], ids=lambda c: c[0]
)
def test_pages_have_no_warnings(page: Path, command: list[str]) -> None:
    result = subprocess.run([*command, str(page)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("path", [*_PROSE, *_PAGES], ids=lambda path: path.name)
def test_documents_name_commands_that_exist(path: Path) -> None:
    text = path.read_text().replace(r"\-", "-")
    named = set(re.findall(r"(?:``|\$ |^    |^)cowfs ([a-z]+)", text, re.MULTILINE))
    assert named <= set(COMMANDS)


def test_the_readme_names_files_that_exist() -> None:
    named = re.findall(r"``((?:docs|scripts|man|tests|cowfs)/[\w./-]+)``", "".join(path.read_text() for path in _PROSE))
    assert named
    for name in named:
        assert (_ROOT / name).exists(), name


def test_every_crash_point_names_what_tries_it() -> None:
    """A kind of power cut or a test; and no kind is left out."""
    text = (_ROOT / "docs" / "durability.rst").read_text()
    section = text[text.index("\nCrash points\n") : text.index("\nFree space in qcow2 images\n")]
    rows = [row.split("\n\n")[0] for row in section.split("   * - ")[1:]]
    found: set[str] = set()
    for row in rows:
        cells = row.split("\n     - ")
        assert len(cells) == 4, row
        kinds = set(re.findall(r"``([a-z]+)``", cells[3]))
        assert kinds <= set(KINDS), row
        assert kinds or "``tests/" in cells[3] or cells[3].strip() in ("the same", "Tried by"), row
        found |= kinds
    assert found == {kind for kind in KINDS if not kind.startswith(HELD)}

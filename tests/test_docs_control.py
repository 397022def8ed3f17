"""cowfs-control(5) names every control file, command and key that there is, and no other."""

import re
from pathlib import Path

import pytest

from cowfs.fuse.control import IMAGE_FILES, MOUNT_FILES
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.tree import LAYERS_DIRECTORY
from cowfs.jobs.control import COMMANDS, KINDS, progress

_PAGE = Path(__file__).parent.parent / "man" / "cowfs-control.5"


def _sections() -> dict[str, list[tuple[int, str]]]:
    """Headings of the page, and under each the tagged terms with their depth."""
    sections: dict[str, list[tuple[int, str]]] = {}
    depth, terms = 0, []
    lines = iter(_PAGE.read_text().splitlines())
    for line in lines:
        if line[:4] in (".SH ", ".SS "):
            terms = sections.setdefault(line[4:], [])
        elif line in (".RS", ".RE"):
            depth += 1 if line == ".RS" else -1
        elif line == ".TP":
            terms.append((depth, re.sub(r"\\f[A-Z]", "", next(lines).removeprefix(".B ")).replace(r"\-", "-")))
    return sections


_SECTIONS = _sections()


def _commands(heading: str) -> dict[str, list[str]]:
    """Files in a section, and the first words of the commands under each."""
    found: dict[str, list[str]] = {}
    for depth, term in _SECTIONS[heading]:
        if depth:
            found[list(found)[-1]].append(re.split("[ =]", term)[0])
        else:
            found[term] = []
    return found


@pytest.mark.parametrize(
    ("heading", "files", "more"),
    [("FILES OF THE MOUNT", MOUNT_FILES, set()), ("FILES OF AN IMAGE", IMAGE_FILES, {LAYERS_DIRECTORY})],
)
def test_files_and_their_commands(heading: str, files: dict[str, ControlFile], more: set[str]) -> None:  # type: ignore[type-arg]
    described = _commands(heading)
    assert set(described) == set(files) | more
    for name, file in files.items():
        assert (file.command is None) == (not file.verbs)
        if name not in KINDS:
            assert described[name] == list(file.verbs), name


def test_commands_of_jobs() -> None:
    assert [re.split("[ =]", term)[0] for _, term in _SECTIONS["JOBS"]] == list(COMMANDS)
    for name in KINDS:
        assert IMAGE_FILES[name].verbs is COMMANDS


@pytest.mark.parametrize("name", KINDS)
def test_keys_of_jobs(name: str) -> None:
    described = [tuple(term.split("=")) for _, term in _SECTIONS[f"Keys of {name}"]]
    assert described == [(name, value) for name, key in KINDS[name].keys.items() for value in key.values]


def test_lines_of_job_files() -> None:
    assert [term for _, term in _SECTIONS["Reading a job file"]] == list(progress(None))


def test_the_overview_shows_every_file() -> None:
    overview = _PAGE.read_text().split(".nf")[1].split(".fi")[0].replace(r"\-", "-")
    for name in (*MOUNT_FILES, *IMAGE_FILES):
        assert name in overview.split() or f"{name}/" in overview.split(), name

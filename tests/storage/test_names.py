"""Names made from names: as long as a name may be, whole characters, no two alike."""

import os
from pathlib import Path

import pytest

from cowfs.storage.names import NAME_MAX, derived_name

SUFFIX = ".suffix"
ROOM = NAME_MAX - len(SUFFIX)


@pytest.mark.parametrize("name", ["a", "n" * ROOM, "ä" * (ROOM // 2)])
def test_what_has_room_has_the_suffix_behind_it(name: str) -> None:
    assert derived_name(f"/dir/{name}", SUFFIX) == f"/dir/{name}{SUFFIX}"


@pytest.mark.parametrize("length", [*range(ROOM + 1, NAME_MAX + 1)])
@pytest.mark.parametrize("letter", ["n", "ä", "€", "😀"])
def test_a_long_name_gives_way(tmp_path: Path, letter: str, length: int) -> None:
    whole = letter * (length // len(letter.encode()))
    name = whole + "x" * (length - len(whole.encode()))
    found = derived_name(f"{tmp_path}/{name}", SUFFIX)
    path = Path(found)
    assert path.parent == tmp_path
    assert path.name.endswith(SUFFIX)
    # no surrogate, which half a character would be
    assert NAME_MAX - 4 < len(path.name.encode()) <= NAME_MAX
    path.touch()
    assert derived_name(f"{tmp_path}/{name[:-1]}y", SUFFIX) != found


def test_bytes_that_are_no_text_are_cut_anywhere() -> None:
    name = os.fsdecode(b"\xff" * NAME_MAX)
    assert len(os.fsencode(derived_name(name, SUFFIX))) == NAME_MAX
    assert os.fsencode(derived_name(os.fsdecode(b"\x80" * NAME_MAX), SUFFIX)).endswith(SUFFIX.encode())


def test_a_derived_name_can_have_another_derived_from_it(tmp_path: Path) -> None:
    first = derived_name(f"{tmp_path}/{'n' * NAME_MAX}", SUFFIX)
    assert len(Path(derived_name(first, SUFFIX)).name) == NAME_MAX

"""By what name an image records a backing file that takes the place of another."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from storages import MemoryStorage

from cowfs.block.image import Backing
from cowfs.block.layer import Layer
from cowfs.errors import UsageError
from cowfs.formats.backingnames import BackingNames, name_below, name_of_active
from cowfs.formats.raw import RawImage

KEEP, RELATIVE, ABSOLUTE = BackingNames


def chain(top: str, *names: str) -> list[Layer]:
    """Layers, active layer first, each as it is named from the one above."""
    layers: list[Layer] = []
    path = top
    for name in (*names, None):
        image = RawImage(MemoryStorage(path, bytes(512)))
        image.backing = None if name is None else Backing(name, "raw")
        layers.append(Layer(image))
        path = os.path.join(os.path.dirname(path), (name or "").removeprefix("file:"))  # noqa: PTH118, PTH120
    return layers


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of directories with a file of each name in each of them, where relative paths begin."""
    for folder in ("a", "b", "c", "c/deep", "a:b"):
        (tmp_path / folder).mkdir()
        for name in ("base", "mid", "top", "x:y"):
            (tmp_path / folder / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


_CASES = [
    # layers, and what the first calls the last: kept, relative, absolute
    (("c/top", "../b/mid", "../a/base"), ("../a/base", "../a/base", "{}/a/base")),
    (("c/top", "mid", "base"), ("base", "base", "{}/c/base")),
    (("c/top", "./mid", "./base"), ("base", "base", "{}/c/base")),
    (("c/top", "deep/mid", "base"), ("deep/base", "deep/base", "{}/c/deep/base")),
    (("c/deep/top", "../mid", "../b/mid", "../a/base"), ("../../a/base", "../../a/base", "{}/a/base")),
    (("c/top", "file:mid", "file:base"), ("base", "base", "{}/c/base")),
    (("c/top", "mid", "./x:y"), ("./x:y", "./x:y", "{}/c/x:y")),
    (("top", "c/mid", "../a:b/base"), ("./a:b/base", "./a:b/base", "{}/a:b/base")),
    # what was absolute anywhere on the way cannot be moved with the image
    (("c/top", "{}/b/mid", "../a/base"), ("{}/a/base", "../a/base", "{}/a/base")),
    (("c/top", "../b/mid", "{}/a/base"), ("{}/a/base", "../a/base", "{}/a/base")),
    (("c/top", "{}/c/mid", "{}/c/base"), ("{}/c/base", "base", "{}/c/base")),
    (("{}/c/top", "../b/mid", "../a/base"), ("../a/base", "../a/base", "{}/a/base")),
    # an absolute name stays as it was written
    (("c/top", "{}/b/mid", "{}/b/../a/base"), ("{}/b/../a/base", "../a/base", "{}/b/../a/base")),
    # what is no path
    (("c/top", "mid", "nbd://h/x"), ("nbd://h/x",) * 3),
    (("c/top", "mid", 'json:{"file.filename":"base"}'), ('json:{"file.filename":"base"}',) * 3),
]


@pytest.mark.parametrize(("names", "expected"), _CASES)
@pytest.mark.parametrize("wanted", BackingNames)
def test_names_are_put_together(
    here: Path, names: Sequence[str], expected: Sequence[str], wanted: BackingNames
) -> None:
    layers = chain(*(name.format(here) if "json:" not in name else name for name in names))
    name = name_below(layers, 0, len(layers) - 1, wanted)
    number = list(BackingNames).index(wanted)
    assert name == (expected[number] if "json:" in expected[number] else expected[number].format(here))


def test_names_in_the_middle_of_a_chain(here: Path) -> None:
    layers = chain("c/top", f"{here}/b/top", "../c/mid", "../a/base")
    assert name_below(layers, 1, 3, KEEP) == "../a/base"
    assert name_below(layers, 0, 3, KEEP) == f"{here}/a/base"


def test_symbolic_links_lead_where_the_kernel_follows_them(here: Path) -> None:
    """The directory of an image is a link: ``..`` leads out of where that leads to."""
    (here / "far/away").mkdir(parents=True)
    (here / "far/b").mkdir()
    (here / "far/b/mid").touch()
    (here / "far/a").mkdir()
    (here / "far/a/base").touch()
    (here / "link").symlink_to("far/away")
    layers = chain("link/top", "../b/mid", "../a/base")
    assert name_below(layers, 0, 2, KEEP) == "../a/base"
    for wanted in (RELATIVE, ABSOLUTE):
        name = name_below(layers, 0, 2, wanted)
        assert (here / "link" / name).samefile(here / "far/a/base")
        assert name.startswith("/") == (wanted is ABSOLUTE)
    # out of a linked directory, which must not be shortened away
    (here / "c/jump").symlink_to("../far/away")
    layers = chain("c/top", "jump/mid", "../a/base")
    for wanted in BackingNames:
        assert (here / "c" / name_below(layers, 0, 2, wanted)).samefile(here / "far/a/base"), wanted


def test_a_link_to_an_image_is_followed_by_its_own_name(here: Path) -> None:
    (here / "a/mid-link").symlink_to("../b/mid")
    layers = chain("c/top", "../a/mid-link", "base")
    # from where the link is, as with QEMU
    assert name_below(layers, 0, 2, KEEP) == "../a/base"


def test_a_name_that_no_header_has_room_for_is_refused_with_what_to_do(here: Path) -> None:
    deep = "/".join(["d" * 200] * 5)
    (here / "c" / deep).mkdir(parents=True)
    layers = chain("c/top", f"{deep}/mid", f"{'e' * 100}/base")
    with pytest.raises(UsageError, match="1023; say with backing-names") as caught:
        name_below(layers, 0, 2, KEEP)
    assert caught.value.file == "c/top"
    # shorter than what it is put together from
    assert name_below(chain("c/top", f"{deep}/mid", "../" * 5 + "base"), 0, 2, KEEP) == "base"


def test_bytes_that_are_no_text(here: Path) -> None:
    name = os.fsdecode(b"\xff\n base")
    (here / "a" / name).touch()
    assert name_below(chain("c/top", "../b/mid", f"../a/{name}"), 0, 2, KEEP) == f"../a/{name}"


@pytest.mark.parametrize(
    ("layers", "overlay", "expected"),
    [
        (("c/top", "../b/mid"), "a/new", ("../c/top", "../c/top", "{}/c/top")),
        (("c/top", "../b/mid"), "{}/c/new", ("top", "top", "{}/c/top")),
        (("c/top",), "c/new", ("top", "top", "{}/c/top")),
        (("c/top",), "{}/a/new", ("{}/c/top", "../c/top", "{}/c/top")),
        (("c/top", "{}/b/mid"), "a/new", ("{}/c/top", "../c/top", "{}/c/top")),
        (("c/top", "nbd://h/x"), "a/new", ("{}/c/top", "../c/top", "{}/c/top")),
        (("c/x:y",), "c/new", ("./x:y", "./x:y", "{}/c/x:y")),
        (("nbd://h/x",), "c/new", ("nbd://h/x",) * 3),
    ],
)
@pytest.mark.parametrize("wanted", BackingNames)
def test_names_of_what_a_snapshot_is_put_on(
    here: Path, layers: Sequence[str], overlay: str, expected: Sequence[str], wanted: BackingNames
) -> None:
    active = chain(*(name.format(here) for name in layers))[0]
    name = name_of_active(active, overlay.format(here), wanted)
    assert name == expected[list(BackingNames).index(wanted)].format(here)


def test_a_snapshot_in_a_linked_directory(here: Path) -> None:
    (here / "far/away").mkdir(parents=True)
    (here / "link").symlink_to("far/away")
    active = chain("c/top", "../b/mid")[0]
    name = name_of_active(active, "link/new", KEEP)
    assert (here / "link" / name).samefile(here / "c/top")

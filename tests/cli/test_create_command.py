import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal

from cowfs.jobs.journal import SUFFIX
from cowfs.storage.names import derived_name


def _qemu_facts(image: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(ok(qemu_img("info", "--output=json", image)))
    return facts


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    ok(qemu_img("create", "-f", "raw", path, "3M"))
    qemu_io(path, "raw", "write -P 7 1M 64k")
    return path


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed"])
def test_an_image_of_a_size(tmp_path: Path, format: str) -> None:
    path = tmp_path / "new"
    out = ok(cowfs("create", "-f", format, path, "5M"))
    assert out == f"Formatting '{path}', fmt={format} size=5242880\n"
    facts = _qemu_facts(path)
    assert (facts["format"], facts["virtual-size"]) == (format, 5 << 20)
    if format != "raw":
        ok(qemu_img("check", path))


def test_a_new_image_has_no_job_to_go_on_with(tmp_path: Path) -> None:
    journal = tmp_path / "new.cowfs-job"
    journal.write_text("of an image that had this name before")
    assert refusal(cowfs("create", "-f", "qcow2", "-b", "missing", "-F", "raw", "new", cwd=tmp_path))
    assert journal.exists()
    ok(cowfs("create", "-q", "-f", "qcow2", "new", "1M", cwd=tmp_path))
    assert not journal.exists()


#: names of as many bytes, up to the most that there can be
LONG = [*(f"{'n' * length}" for length in (241, 242, 245, 246, 255)), "ä" * 127, "€" * 85, "😀" * 63 + "nnn"]


@pytest.mark.parametrize("name", LONG, ids=lambda name: f"{name[0]}-{len(name.encode())}")
def test_a_name_may_be_as_long_as_the_host_allows(tmp_path: Path, name: str) -> None:
    journal = Path(derived_name(f"{tmp_path}/{name}", SUFFIX))
    journal.write_text("of an image that had this name before")
    ok(cowfs("create", "-q", "-f", "qcow2", name, "1M", cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    ok(qemu_img("check", tmp_path / name))
    for words in (["resize", name, "+1M"], ["snapshot", "-c", "s", name], ["check", name], ["info", name]):
        assert cowfs(*words, cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("over", ["name", "path"])
def test_a_name_that_is_longer_is_refused_and_leaves_nothing(tmp_path: Path, over: str) -> None:
    name = "n" * 256 if over == "name" else "/".join(["n"] * 2049)
    sentence = refusal(cowfs("create", "-f", "qcow2", name, "1M", cwd=tmp_path))
    assert sentence == f"{name}: cannot open: File name too long"
    assert list(tmp_path.iterdir()) == []


def test_raw_is_the_default_and_quiet_is_quiet(tmp_path: Path) -> None:
    assert ok(cowfs("create", "-q", "new", "1000", cwd=tmp_path)) == ""
    assert (tmp_path / "new").stat().st_size == 1024


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_a_backing_file_gives_size_and_content(tmp_path: Path, base: Path, format: str) -> None:
    (tmp_path / "sub").mkdir()
    ok(cowfs("create", "-f", format, "-b", "../base.raw", "-F", "raw", "sub/new", cwd=tmp_path))
    assert _qemu_facts(tmp_path / "sub/new")["backing-filename"] == "../base.raw"
    assert _qemu_facts(tmp_path / "sub/new")["backing-filename-format"] == "raw"
    ok(qemu_img("compare", tmp_path / "sub/new", base))


def test_the_backing_file_may_be_given_as_options(tmp_path: Path, base: Path) -> None:
    options = f"backing_file={base},backing_fmt=raw,size=8M"
    ok(cowfs("create", "-f", "qcow2", "-o", options, tmp_path / "new"))
    facts = _qemu_facts(tmp_path / "new")
    assert (facts["virtual-size"], facts["backing-filename"]) == (8 << 20, str(base))


def test_a_comma_in_a_value_is_doubled(tmp_path: Path, base: Path) -> None:
    base.rename(tmp_path / "a,b.raw")
    ok(cowfs("create", "-f", "qcow2", "-o", "backing_file=a,,b.raw,backing_fmt=raw", tmp_path / "new"))
    assert _qemu_facts(tmp_path / "new")["backing-filename"] == "a,b.raw"


def test_options_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    ok(cowfs("create", "-f", "qcow2", "-o", "cluster_size=4k", "-o", "compat=0.10", path, "1M"))
    facts = _qemu_facts(path)
    assert (facts["cluster-size"], facts["format-specific"]["data"]["compat"]) == (4096, "0.10")


@pytest.mark.parametrize("word", ["help", "?"])
def test_options_are_listed(word: str) -> None:
    out = ok(cowfs("create", "-f", "qcow2", "-o", word))
    assert out.startswith("Supported qcow2 options:\n")
    for option in ("size", "cluster_size", "backing_file"):
        assert f"\n  {option} " in out


def test_an_unsafe_backing_file_need_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "new"
    ok(cowfs("create", "-u", "-f", "qcow2", "-b", "later.raw", "-F", "raw", path, "1M"))
    assert _qemu_facts(path)["backing-filename"] == "later.raw"


_REFUSED: list[tuple[list[str], str]] = [
    (["new"], "needs a size"),
    (["-f", "vmdk", "new", "1M"], "unknown format 'vmdk'"),
    (["new", "1Z"], "'1Z' is not a size"),
    (["new", "--", "-5"], "'-5' is not a size"),
    (["-f", "qcow2", "new", "100000P"], "too large"),
    (["-f", "qcow2", "new", "1E"], "too large"),
    (["-o", "nonsense=1", "new", "1M"], "no option 'nonsense'"),
    (["-o", "nonsense", "new", "1M"], "write KEY=VALUE"),
    (["-o", "preallocation=some", "new", "1M"], "preallocation=some"),
    (["-f", "qcow2", "-o", "cluster_size=3k", "new", "1M"], "cluster_size=3k"),
    (["-f", "qed", "-o", "cluster_size=1", "new", "1M"], "cluster_size"),
    (["-o", "size=1M", "new", "2M"], "given twice"),
    (["-f", "qcow2", "-F", "raw", "new", "1M"], "without a backing file"),
    (["-b", "base.raw", "-F", "raw", "new"], "cannot have a backing file"),
    (["-f", "qcow2", "-b", "base.raw", "new"], "looks like raw: add -F raw"),
    (["-f", "qcow2", "-b", "base.raw", "-F", "qcow2", "new"], "base.raw: "),
    (["-f", "qcow2", "-b", "base.raw", "-F", "bogus", "new"], "unknown format 'bogus'"),
    (["-f", "qcow2", "-b", "gone.raw", "-F", "raw", "new"], "gone.raw: cannot open: No such file"),
    (["-f", "qcow2", "-b", "gone.raw", "-F", "raw", "new", "1M"], "gone.raw: cannot open: No such file"),
    (["-f", "qcow2", "-b", "gluster://host/x", "-F", "raw", "new"], "no local file"),
    (["-f", "qcow2", "-u", "-b", "gone.raw", "-F", "raw", "new"], "needs a size"),
    (["-f", "qcow2", "-b", "base.raw", "-o", "backing_file=other", "-F", "raw", "new"], "given twice"),
]


@pytest.mark.parametrize(("args", "says"), _REFUSED, ids=[" ".join(args) for args, _ in _REFUSED])
@pytest.mark.parametrize("exists", [False, True])
def test_what_is_refused_changes_nothing(tmp_path: Path, base: Path, args: list[str], says: str, exists: bool) -> None:
    if exists:
        (tmp_path / "new").write_bytes(b"precious")
    before = _snapshot(tmp_path)
    assert says in refusal(cowfs("create", *args, cwd=tmp_path))
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["base.raw", "overlay.qcow2"])
def test_an_image_in_its_own_backing_chain_is_refused(tmp_path: Path, base: Path, target: str) -> None:
    ok(qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "overlay.qcow2"))
    before = _snapshot(tmp_path)
    line = refusal(cowfs("create", "-f", "qed", "-b", "overlay.qcow2", "-F", "qcow2", target, cwd=tmp_path))
    assert line.startswith(f"{target}: ")
    assert _snapshot(tmp_path) == before


def test_targets_that_cannot_be_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for target, says in (
        (".", "directory"),
        ("fifo", "neither"),
        ("no/such/dir", "No such file"),
        ("/dev/null", "neither"),
    ):
        assert says in refusal(cowfs("create", target, "1M", cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_a_failure_on_the_way_leaves_no_new_file(tmp_path: Path) -> None:
    assert "File too large" in refusal(
        cowfs("create", "new", "2M", cwd=tmp_path, prefix=("prlimit", "--fsize=1048576"))
    )
    assert list(tmp_path.iterdir()) == []


def _snapshot(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}

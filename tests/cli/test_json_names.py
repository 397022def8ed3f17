"""QEMU's ``json:`` names on the command line and in headers: what QEMU reads, and refused what it refuses."""

import json
import os
import random
from pathlib import Path

import pytest
from commandline import cowfs, ok, qemu_img, qemu_io, refusal
from nbdservers import Servers

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

MIB = 1 << 20
#: where the images begin in the file that holds them all
PART = 3 * MIB

_FORMS = {
    "dotted": '{"file.filename":"RAW"}',
    "nested": '{"file":{"driver":"file","filename":"RAW"}}',
    "raw": '{"driver":"raw","file":{"driver":"file","filename":"RAW"}}',
    "single quotes": "{'driver':'raw','file':{'driver':'file','filename':'RAW'}}",
    "options": '{"driver":"raw","node-name":"x","read-only":true,"discard":"unmap","detect-zeroes":"off","cache":'
    '{"direct":false,"no-flush":false},"auto-read-only":true,"file":{"driver":"file","filename":"RAW","locking":"off",'
    '"aio":"threads"}}',
    "offset": '{"driver":"raw","offset":512,"file.filename":"RAW"}',
    "odd offset": '{"driver":"raw","offset":"777","size":4096,"file.filename":"RAW"}',
    "size": '{"driver":"raw","size":"64k","file.filename":"RAW"}',
    "offset and size": '{"driver":"raw","offset":"0x1000","size":131072,"file.filename":"RAW"}',
    "nothing": '{"driver":"raw","offset":2097152,"file.filename":"RAW"}',
    "raw over raw": '{"driver":"raw","offset":512,"file":{"driver":"raw","offset":4096,"size":65536,"file.filename":'
    '"RAW"}}',
    "qcow2": '{"driver":"qcow2","file":{"driver":"file","filename":"QCOW2"}}',
    "qed": "{'driver':'qed','file.filename':'QED'}",
    "qcow2 in a part": '{"driver":"qcow2","file":{"driver":"raw","offset":3145728,"size":SIZE,"file":{"driver":"file",'
    '"filename":"HOLDER"}}}',
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """What the words in capitals above stand for."""
    raw, qcow2, qed, holder = (tmp_path / name for name in ("it's raw", "q.qcow2", "q.qed", "holder"))
    raw.write_bytes(random.Random(1).randbytes(2 * MIB))
    for path, format in ((qcow2, "qcow2"), (qed, "qed")):
        # found from the holder's directory too
        ok(qemu_img("create", "-q", "-f", format, "-b", raw.name, "-F", "raw", path, cwd=tmp_path))
        qemu_io(path, format, "write -P 7 100k 300k", "write -z 1M 64k")
    holder.write_bytes(os.urandom(PART) + qcow2.read_bytes() + os.urandom(MIB))
    size = -(-qcow2.stat().st_size // 512) * 512
    return {"RAW": str(raw), "QCOW2": str(qcow2), "QED": str(qed), "HOLDER": str(holder), "SIZE": str(size)}


def named(form: str, files: dict[str, str]) -> str:
    text = _FORMS[form]
    for word, value in files.items():
        text = text.replace(word, value.replace("'", "\\'"))
    return f"json:{text}"


@pytest.mark.parametrize("form", _FORMS)
def test_qemu_and_cowfs_read_the_same(files: dict[str, str], tmp_path: Path, form: str) -> None:
    name = named(form, files)
    mine, theirs, top = (tmp_path / path for path in ("mine", "theirs", "top.qcow2"))
    ok(qemu_img("convert", "-O", "raw", name, theirs))
    ok(cowfs("convert", "-q", "-O", "raw", name, mine))
    assert mine.read_bytes() == theirs.read_bytes()
    facts, known = (json.loads(ok(run("info", "--output=json", name))) for run in (cowfs, qemu_img))
    assert (facts["virtual-size"], facts["format"]) == (known["virtual-size"], known["format"])
    ok(cowfs("compare", "-q", name, mine, "-F", "raw"))
    assert json.loads(ok(cowfs("map", "--json", name)))[-1:] != [] or not mine.stat().st_size

    # as a backing file, written by QEMU, which looks for it
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", known["format"], top, "2M"))
    for path, run in ((mine, cowfs), (theirs, qemu_img)):
        ok(run("convert", "-O", "raw", top, path, *(["-q"] if run is cowfs else [])))
    assert mine.read_bytes() == theirs.read_bytes()
    facts, known = (
        json.loads(ok(run("info", "--output=json", "--backing-chain", top)))[0] for run in (cowfs, qemu_img)
    )
    for key in ("backing-filename", "full-backing-filename", "backing-filename-format"):
        assert facts[key] == known[key]
    assert f"backing file: {name}\n" in ok(cowfs("info", top))
    ok(cowfs("check", "-q", top))
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", name, "-F", known["backing-filename-format"], top, "2M"))
    ok(cowfs("compare", "-q", top, mine, "-F", "raw"))
    assert json.loads(ok(qemu_img("info", "--output=json", top)))["backing-filename"] == name


_REFUSED = [
    '{"driver":"raw","offset":2097664,"file.filename":"RAW"}',
    '{"driver":"raw","offset":2097152,"size":512,"file.filename":"RAW"}',
    '{"driver":"raw","size":2097664,"file.filename":"RAW"}',
    '{"driver":"raw","size":100,"file.filename":"RAW"}',
    '{"driver":"raw","offset":-512,"file.filename":"RAW"}',
    '{"driver":"raw","offset":99999999999999999999,"file.filename":"RAW"}',
    '{"driver":"raw","offset":1.5,"file.filename":"RAW"}',
    '{"driver":"raw","foo":1,"file.filename":"RAW"}',
    '{"driver":"raw","driver":"raw","file.filename":"RAW"}',
    '{"driver":"raw","node-name":"1 x","file.filename":"RAW"}',
    '{"driver":"raw","read-only":"maybe","file.filename":"RAW"}',
    '{"driver":"raw","file":"RAW"}',
    '{"driver":"raw","file":{"driver":"host_device","filename":"RAW"}}',
    '{"driver":"raw","file":{"driver":"nowhere"}}',
    '{"driver":"raw","file.filename":"RAW"} x',
    '{"driver":"raw","file.filename":"RAW",}',
    '{"filename":"RAW"}',
    "{}",
    "[1]",
    "",
    '{"driver":"file","filename":"gone"}',
]


@pytest.mark.parametrize("text", _REFUSED)
def test_what_qemu_refuses_is_refused_in_one_line(files: dict[str, str], tmp_path: Path, text: str) -> None:
    name = "json:" + text.replace("RAW", files["RAW"])
    assert qemu_img("info", name).returncode == 1
    refusal(cowfs("info", name))
    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", top, "2M"))
    assert refusal(cowfs("info", "--backing-chain", top)).startswith((f"{top}: ", f"{files['RAW']}: ", "gone: "))
    # what the header says can be seen all the same
    assert json.loads(ok(cowfs("info", "--json", top)))["backing-filename"] == name


def test_nothing_is_made_under_such_a_name(files: dict[str, str], tmp_path: Path) -> None:
    name = named("raw", files)
    before = Path(files["RAW"]).read_bytes()
    assert "give the path of a new image" in refusal(cowfs("create", "-q", name, "1M", cwd=tmp_path))
    assert "give the path of a new image" in refusal(cowfs("convert", "-q", files["HOLDER"], name))
    assert Path(files["RAW"]).read_bytes() == before


def test_writing_stays_inside(files: dict[str, str], tmp_path: Path) -> None:
    """convert -n, commit and resize of an image that lies in a part of a file."""
    holder, size = Path(files["HOLDER"]), int(files["SIZE"])
    before = holder.read_bytes()
    base = f'json:{{"driver":"raw","offset":4096,"size":{MIB},"file.filename":"{holder}"}}'
    data = tmp_path / "data"
    data.write_bytes(os.urandom(MIB))
    ok(cowfs("convert", "-q", "-n", "-O", "raw", data, base))
    expected = before[:4096] + data.read_bytes() + before[4096 + MIB :]
    assert holder.read_bytes() == expected

    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top))
    qemu_io(top, "qcow2", "write -P 5 8k 8k")
    ok(cowfs("commit", "-q", top))
    expected = expected[:12288] + b"\5" * 8192 + expected[20480:]
    assert holder.read_bytes() == expected
    assert json.loads(ok(qemu_img("info", "--output=json", top)))["backing-filename"] == base
    ok(qemu_img("check", "-q", top))
    qemu_io(top, "qcow2", "write -P 6 0 4k")
    ok(cowfs("resize", "-q", top, "2M"))
    assert "no place for more" in refusal(cowfs("commit", "-q", top))
    assert holder.read_bytes() == expected

    inner = named("qcow2 in a part", files)
    ok(cowfs("check", "-q", inner))
    assert refusal(cowfs("resize", "-q", base, "2M"))
    assert holder.read_bytes() == expected
    assert len(expected) >= PART + size


def test_a_chain_that_comes_back_through_a_part_is_refused(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    for text in (
        f'{{"driver":"qcow2","file.filename":"{top}"}}',
        f'{{"driver":"raw","offset":512,"file.filename":"{top}"}}',
    ):
        format = json.loads(text)["driver"]
        ok(qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", f"json:{text}", "-F", format, top, "1M"))
        assert "comes back to this file" in refusal(cowfs("info", "--backing-chain", top))


def test_parts_of_one_file_make_a_chain(tmp_path: Path) -> None:
    """A base and an overlay, both in one file, which QEMU reads too."""
    base, holder = tmp_path / "base.qcow2", tmp_path / "holder"
    ok(qemu_img("create", "-q", "-f", "qcow2", base, "4M"))
    qemu_io(base, "qcow2", "write -P 3 1M 1M")
    holder.write_bytes(base.read_bytes().ljust(4 * MIB, b"\0"))
    below = f'json:{{"driver":"qcow2","file":{{"driver":"raw","size":{4 * MIB},"file.filename":"{holder}"}}}}'
    over = tmp_path / "over.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", over))
    qemu_io(over, "qcow2", "write -P 4 0 64k")
    with holder.open("ab") as file:
        file.write(over.read_bytes())
    name = f'json:{{"driver":"qcow2","file":{{"driver":"raw","offset":{4 * MIB},"file.filename":"{holder}"}}}}'
    ok(cowfs("convert", "-q", "-O", "raw", name, tmp_path / "mine"))
    ok(qemu_img("convert", "-O", "raw", name, tmp_path / "theirs"))
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "mine").read_bytes()[:2] == b"\4\4"
    assert len(json.loads(ok(cowfs("info", "--json", "--backing-chain", name)))) == 2


def test_what_changes_beside_a_base_does_not_matter(files: dict[str, str], tmp_path: Path) -> None:
    holder, top = Path(files["HOLDER"]), tmp_path / "top.qcow2"
    base = f'json:{{"driver":"raw","offset":4096,"size":{MIB},"file.filename":"{holder}"}}'
    ok(cowfs("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top))
    for offset, changes in ((0, False), (4096 + MIB, False), (4096, True)):
        with holder.open("r+b") as file:
            file.seek(offset)
            file.write(b"changed!")
        os.utime(holder, (1, 1))
        if changes:
            assert "its content is another" in refusal(cowfs("map", top))
        else:
            ok(cowfs("map", top))


@pytest.mark.needs("qemu-nbd")
def test_a_part_of_an_export(servers: Servers, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(2 * MIB))
    server = servers.qemu(raw, "-r")
    socket = server.uri.partition("socket=")[2]
    name = (
        f'json:{{"driver":"raw","offset":4096,"size":{MIB},"file":{{"driver":"nbd","server":{{"type":"unix",'
        f'"path":"{socket}"}}}}}}'
    )
    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", top))
    for source in (name, str(top)):
        ok(cowfs("convert", "-q", "-O", "raw", source, tmp_path / "mine"))
        assert (tmp_path / "mine").read_bytes() == raw.read_bytes()[4096 : 4096 + MIB]
    ok(cowfs("stream", "-q", top))
    ok(qemu_img("compare", "-q", "-F", "raw", top, tmp_path / "mine"))


def test_a_relative_file_is_meant_from_where_one_is(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/base.raw").write_bytes(b"\7" * MIB)
    top = tmp_path / "top.qcow2"
    ok(qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", 'json:{"file.filename":"base.raw"}', "-F", "raw", top, "1M"))
    for run in (qemu_img, cowfs):
        assert run("convert", "-O", "raw", top, tmp_path / "out", cwd=tmp_path).returncode == 1
        assert run("convert", "-O", "raw", top, tmp_path / "out", cwd=tmp_path / "here").returncode == 0
        assert (tmp_path / "out").read_bytes() == b"\7" * MIB
        (tmp_path / "out").unlink()

"""QEMU's ``json:`` names: what they stand for, and what is refused in which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.block.image import Backing
from cowfs.errors import CowfsError, InvalidImage, NotPermitted, Unsupported
from cowfs.formats.chain import Opening, backing_source
from cowfs.formats.jsonname import absolute_name, resolve_name
from cowfs.storage import is_remote, local_path
from cowfs.storage.jsonname import Place, Window, place_of
from cowfs.storage.nbd.address import Address

_EXPORT = {"driver": "nbd", "server": {"type": "inet", "host": "h", "port": "10810"}, "export": "x"}
_EXPORTS = [
    (_EXPORT, "raw"),
    ({"driver": "raw", "file": _EXPORT}, "raw"),
    ({"driver": "qcow2", "file": _EXPORT}, "qcow2"),
    ({"file": _EXPORT}, None),
    ({"driver": "nbd", "host": "h", "port": 10810, "export": "x"}, "raw"),
    ({"driver": "nbd", "server.type": "inet", "server.host": "h", "server.port": "10810", "export": "x"}, "raw"),
    ({"driver": "raw", "file.driver": "nbd", "file.host": "h", "file.port": "10810", "file.export": "x"}, "raw"),
    ({**_EXPORT, "reconnect-delay": 10, "node-name": "n"}, "raw"),
]


@pytest.mark.parametrize(("tree", "format"), _EXPORTS)
def test_names_of_exports(tree: dict[str, object], format: str | None) -> None:
    source = backing_source("dir/top", Backing(f"json:{json.dumps(tree)}", None))
    assert (source.name, source.format) == ("nbd://h:10810/x", format)


def _part(offset: int, size: int | None) -> Place:
    return Place("/b", None, Window(offset, size))


_FILE = {"driver": "file", "filename": "/b"}
_PLACES = [
    ('{"file.filename":"/b"}', Place("/b"), None),
    ('{"file":{"filename":"/b"},"driver":null}', Place("/b"), None),
    ('{"driver":"file","filename":"/b"}', Place("/b", "file"), "raw"),
    ('{"driver":"host_device","filename":"/b"}', Place("/b", "host_device"), "raw"),
    ("{'driver':'qed','file':{'driver':'file','filename':'/b'}}", Place("/b", "file"), "qed"),
    ('{"driver":\'raw\',"file.filename":"/b"}', Place("/b"), "raw"),
    ("{'file.filename':'/it\\'s \"b\" \\u00e4'}", Place('/it\'s "b" ä'), None),
    ('{"file.filename":"/it\\\'s \\"b\\""}', Place('/it\'s "b"'), None),
    (' { "file" : { "filename" : "/b" } } ', Place("/b"), None),
    ('{"driver":"raw","offset":512,"size":1024,"file.filename":"/b"}', _part(512, 1024), "raw"),
    (
        '{"driver":"raw","offset":"0x200","size":"1.5k","file.filename":"/b"}',
        _part(512, 1536),
        "raw",
    ),
    ('{"driver":"raw","offset":1e3,"file.filename":"/b"}', _part(1000, None), "raw"),
    ('{"driver":"raw","offset":null,"size":null,"file.filename":"/b"}', Place("/b"), "raw"),
    (
        '{"driver":"qcow2","file":{"driver":"raw","offset":512,"size":1024,"file":{"driver":"raw","offset":4096,'
        '"file.filename":"/b"}}}',
        _part(4608, 1024),
        "qcow2",
    ),
    (
        '{"driver":"raw","offset":512,"file":{"driver":"raw","offset":4096,"size":2048,"file.filename":"/b"}}',
        _part(4608, 1536),
        "raw",
    ),
    ('{"driver":"qcow2","read-only":"on","file.filename":"/b"}', Place("/b", read_only=True), "qcow2"),
    ('{"driver":"raw","file":{"filename":"/b","read-only":true}}', Place("/b", read_only=True), "raw"),
    (
        '{"driver":"qcow2","node-name":"fmt-1","discard":"unmap","detect-zeroes":"on","cache.direct":false,'
        '"cache":{"no-flush":"off"},"auto-read-only":true,"force-share":false,"l2-cache-size":"1M",'
        '"overlap-check":"all","lazy-refcounts":true,"file":{"driver":"file","filename":"/b","locking":"auto",'
        '"aio":"native","node-name":"n.1"}}',
        Place("/b", "file"),
        "qcow2",
    ),
]


@pytest.mark.parametrize(("text", "place", "format"), _PLACES)
def test_names_of_files(text: str, place: Place, format: str | None) -> None:
    found = resolve_name(f"json:{text}")
    assert found == (place.name, format)
    if found.name.startswith("json:"):
        assert place_of(found.name) == place
    assert local_path(found.name) == place.target
    assert resolve_name(found.name, format).name == found.name


_WRONG = [
    ('{"driver":"vmdk","file.filename":"/b"}', "the driver 'vmdk'"),
    ('{"driver":"blkdebug","image.filename":"/b"}', "the driver 'blkdebug'"),
    ('{"driver":"raw","file.driver":"https","file.url":"https://h/x"}', "the driver 'https'"),
    ('{"driver":"raw","file":{"driver":"qcow2","file.filename":"/b"}}', "the driver 'qcow2' for its bytes"),
    ('{"driver":"raw","file":"node"}', "another block device would have to define"),
    ('{"driver":"raw"}', "no 'file'"),
    ("{}", "no 'file'"),
    ('{"filename":"/b"}', "'filename', which cowfs does not know"),
    ('{"driver":"file"}', "no 'filename'"),
    ('{"driver":"file","filename":""}', "no 'filename'"),
    ('{"driver":"file","filename":3}', "no text"),
    ('{"driver":"file","filename":"/a\\u0000b"}', "letters that no name has"),
    ('{"driver":"file","filename":"/a\\ud800b"}', "letters that no name has"),
    ('{"driver":["file"],"filename":"/b"}', "no text"),
    ('{"driver":"file","filename":"/b","foo":1}', "'foo'"),
    ('{"driver":"file","filename":"/b","pr-manager":"x"}', "'pr-manager'"),
    ('{"driver":"qcow2","backing":null,"file.filename":"/b"}', "'backing'"),
    ('{"driver":"qcow2","encrypt.format":"luks","file.filename":"/b"}', "'encrypt'"),
    ('{"driver":"qcow2","data-file.filename":"/c","file.filename":"/b"}', "'data-file'"),
    ('{"driver":"qed","l2-cache-size":1,"file.filename":"/b"}', "'l2-cache-size'"),
    ('{"driver":"qcow2","offset":512,"file.filename":"/b"}', "'offset'"),
    ('{"driver":"raw","read-only":"maybe","file.filename":"/b"}', "neither on nor off"),
    ('{"driver":"raw","discard":"maybe","file.filename":"/b"}', "'discard' that makes no sense"),
    ('{"driver":"raw","node-name":"1 x","file.filename":"/b"}', "'node-name' that makes no sense"),
    ('{"driver":"raw","cache":{"direct":7},"file.filename":"/b"}', "'cache.direct' that makes no sense"),
    ('{"driver":"raw","cache":{"size":7},"file.filename":"/b"}', "'cache'"),
    ('{"driver":"raw","cache":true,"file.filename":"/b"}', "'cache'"),
    ('{"driver":"raw","offset":-512,"file.filename":"/b"}', "'offset' -512"),
    ('{"driver":"raw","offset":1.5,"file.filename":"/b"}', "'offset' 1.5"),
    ('{"driver":"raw","offset":true,"file.filename":"/b"}', "'offset' true"),
    ('{"driver":"raw","offset":1e400,"file.filename":"/b"}', "'offset'"),
    ('{"driver":"raw","offset":NaN,"file.filename":"/b"}', "JSON"),
    (f'{{"driver":"raw","offset":{"9" * 5000},"file.filename":"/b"}}', "JSON"),
    (f'{{"driver":"raw","size":{1 << 63},"file.filename":"/b"}}', "'size'"),
    (f'{{"driver":"raw","offset":{(1 << 63) - 512},"size":1024,"file.filename":"/b"}}', "beyond all sizes"),
    ('{"driver":"raw","size":100,"file.filename":"/b"}', "no multiple of 512"),
    (
        '{"driver":"raw","offset":512,"size":1024,"file":{"driver":"raw","size":1024,"file.filename":"/b"}}',
        "reaches beyond it",
    ),
    ('{"driver":"nbd","tls-creds":"x"}', "'tls-creds'"),
    ('{"driver":"nbd","server":{"type":"fd","str":"3"}}', "'fd'"),
    ('{"driver":"nbd","server":{"type":"unix","path":"/s","abstract":true}}', "'abstract'"),
    ('{"driver":"nbd","server":{"type":"inet","host":"h","port":"1","ipv6":true}}', "'ipv6'"),
    ('{"driver":"nbd","host":"h","server":{"type":"inet"}}', "makes no sense"),
    ('{"driver":"nbd","host":"h","port":0}', "from 1 to 65535"),
    ('{"driver":"nbd","host":"h","host":"i"}', "twice"),
    ('{"driver":"nbd","server.type":"inet","server":{"type":"inet"}}', "twice"),
    ('{"file.filename":"/b","file":"/c"}', "twice"),
    ('{"driver":"nbd","host":["h"]}', "no text"),
    ('{"driver":"nbd","port":"http"}', "port"),
    ("[]", "no block device"),
    ("3", "no block device"),
    ("{", "JSON"),
    ("{'file.filename':'/b}", "JSON"),
    ("{'file.filename':'/b'} x", "JSON"),
    ("{'file.filename':'/b',}", "JSON"),
    ("{'file.filename':'/b\n'}", "JSON"),
    ("{'file.filename':'/\\x41'}", "JSON"),
    ("{file:{filename:1}}", "JSON"),
    ("[" * 100_000, "JSON"),
    ('{"a":' * 50_000, "JSON"),
    ("", "JSON"),
    ('{"file.filename":"/\udcff"}', "JSON"),
]


@pytest.mark.parametrize(("text", "says"), _WRONG, ids=[text[:60] for text, _ in _WRONG])
def test_names_that_are_refused(text: str, says: str) -> None:
    with pytest.raises(CowfsError) as caught:
        backing_source("top", Backing(f"json:{text}", None))
    assert caught.value.file == "top"
    assert caught.value.message.startswith(f"its backing file 'json:{text}' ")
    assert says in caught.value.message.removeprefix(f"its backing file 'json:{text}' ")


@pytest.mark.parametrize("depth", [2, 900, 100_000])
def test_depth_does_no_harm(depth: int) -> None:
    nested = f'json:{{"{"file." * depth}filename":"/b"}}'
    with pytest.raises(Unsupported):
        resolve_name(nested)
    raw = '{"driver":"raw","offset":1,"file":' * depth + '{"filename":"/b"}' + "}" * depth
    try:
        assert place_of(f"json:{raw}").window == Window(depth, None)
    except Unsupported as error:
        assert depth > 100
        assert "JSON" in error.message


@given(st.text(max_size=60) | st.text("{}[]'\"\\:,.filedrvnam ", max_size=60))
def test_no_name_does_anything_but_stand_or_be_refused(text: str) -> None:
    try:
        backing_source("top", Backing(f"json:{text}", None))
    except CowfsError as error:
        assert error.file == "top"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["raw", "file", "nbd", "/b", "on", "1k"]),
    lambda inner: st.dictionaries(
        st.sampled_from(["driver", "file", "filename", "offset", "size", "file.driver", "cache.direct", "server", "x"]),
        inner,
    ),
)


@given(_VALUES)
def test_no_tree_does_anything_but_stand_or_be_refused(tree: object) -> None:
    try:
        found = resolve_name(f"json:{json.dumps(tree)}")
    except CowfsError as error:
        assert error.message
    else:
        assert resolve_name(found.name, found.format).name == found.name


def test_a_name_and_the_header_agree_on_the_format() -> None:
    name = f"json:{json.dumps({'driver': 'raw', 'file': _FILE})}"
    with pytest.raises(InvalidImage, match="is said to be qcow2 too"):
        backing_source("top", Backing(name, "qcow2"))
    # without a driver, or with that of its bytes alone, the header says it
    for tree in ({"file": _FILE}, _FILE):
        assert backing_source("top", Backing(f"json:{json.dumps(tree)}", "qcow2")).format == "qcow2"


def test_what_comes_from_a_server_does_not_lead_into_this_host() -> None:
    for text in ('{"file.filename":"/etc/shadow"}', '{"driver":"raw","offset":512,"file.filename":"/etc/shadow"}'):
        for top in ("nbd://evil/x", f"json:{json.dumps({'driver': 'raw', 'offset': 512, 'file': _EXPORT})}"):
            with pytest.raises(NotPermitted, match="comes from a server"):
                backing_source(top, Backing(f"json:{text}", "raw"))
    part = f"json:{json.dumps({'driver': 'raw', 'offset': 512, 'file': _EXPORT})}"
    assert place_of(backing_source("nbd://evil/x", Backing(part, "raw")).name).target == Address("x", "h", 10810)
    assert is_remote(backing_source("top", Backing(part, None)).name)


def test_headers_have_absolute_sockets_only() -> None:
    with pytest.raises(InvalidImage, match="no absolute path"):
        backing_source("top", Backing('json:{"driver":"nbd","path":"s"}', "raw"))


def test_a_relative_file_is_one_of_the_working_directory_or_of_none() -> None:
    relative = Backing('json:{"driver":"raw","offset":512,"file.filename":"b"}', "raw")
    assert local_path(backing_source("dir/top", relative).name) == "b"
    with pytest.raises(InvalidImage, match="a mount needs an absolute path"):
        backing_source("dir/top", relative, Opening(from_here=False))
    assert (local_path(absolute_name(backing_source("dir/top", relative).name)) or "").startswith("/")


def test_files_may_be_called_so() -> None:
    assert resolve_name("./json:{}") == ("./json:{}", None)
    assert resolve_name('json:{"file.filename":"nbd:x"}').name == "./nbd:x"
    assert resolve_name('json:{"file.filename":"json:x"}').name == "./json:x"

from pathlib import Path

import pytest

from cowfs.block.detectzeroes import DetectZeroes
from cowfs.errors import UsageError
from cowfs.fuse.images import Source, check_name
from cowfs.fuse.options import Settings, parse_options


def test_nothing_given_gives_the_defaults() -> None:
    assert parse_options([]) == Settings()
    assert parse_options(["", "rw,defaults,_netdev,x-systemd.automount,noauto,user,default_permissions"]) == Settings()


def test_all_at_once() -> None:
    words = "ro,allow_other,uid=7,gid=8,mode=0640,no-copy-on-read,format=raw,flush-interval=0.5,log=/tmp/l,noatime"
    assert parse_options([words, "snapshot=a b", "cache-size=4M,allow-shrink,detect-zeroes=unmap"]) == Settings(
        read_only=True,
        allow_other=True,
        uid=7,
        gid=8,
        mode=0o640,
        copy_on_read=False,
        format="raw",
        snapshot="a b",
        flush_interval=0.5,
        cache_size=4 << 20,
        allow_shrink=True,
        detect_zeroes=DetectZeroes.UNMAP,
        log="/tmp/l",
        flags=frozenset({"noatime"}),
    )


def test_the_last_of_two_counts() -> None:
    assert parse_options(["no-copy-on-read", "copy-on-read,ro,rw"]) == Settings()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("nonsense", "unknown mount option 'nonsense'"),
        ("cache-size=1023k", "mount option cache-size: '1023k' is not a size of at least 1M"),
        ("cache-size=all", "mount option cache-size: 'all' is not a size of at least 1M"),
        ("nonsense=1", "unknown mount option 'nonsense'"),
        ("uid", "mount option uid needs a value: uid=…"),
        ("uid=me", "mount option uid: 'me' is not a number from 0 to 4294967294"),
        ("uid=²", "mount option uid: '²' is not a number from 0 to 4294967294"),
        ("mode=8", "mount option mode: '8' is not a mode from 0 to 0777"),
        ("mode=7777", "mount option mode: '7777' is not a mode from 0 to 0777"),
        ("ro=1", "mount option ro takes no value"),
        ("flush-interval=0", "mount option flush-interval: '0' is not a number of seconds"),
        ("flush-interval=inf", "mount option flush-interval: 'inf' is not a number of seconds"),
        ("flush-interval=often", "mount option flush-interval: 'often' is not a number of seconds"),
        ("detect-zeroes=yes", "mount option detect-zeroes: 'yes' is none of off, on, unmap"),
        ("format=vmdk", "unknown format 'vmdk'; cowfs knows qcow2, qed, raw"),
    ],
)
def test_bad_options_are_refused(option: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options([f"rw,{option}"])
    assert str(caught.value) == sentence


def test_image_words() -> None:
    assert Source.parse("/images/a.qcow2") == Source("/images/a.qcow2")
    assert Source.parse("vm=/images/a=b") == Source("/images/a=b", "vm")
    assert Source.parse("./vm=1/a") == Source("./vm=1/a")


def test_a_file_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("a=b.raw", "wb"):
        assert Source.parse("a=b.raw") == Source("a=b.raw")
    assert Source.parse("a=c.raw") == Source("c.raw", "a")


@pytest.mark.parametrize("name", ["", ".", "..", ".cowfs", "a/b", "a\nb", "a\0b", "ü" * 128])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="NAME=FILE"):
        check_name(name)

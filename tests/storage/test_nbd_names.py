"""Names of exports, as users and headers write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.block.image import Backing
from cowfs.errors import CowfsError, InvalidImage, NotPermitted
from cowfs.formats.chain import backing_source
from cowfs.storage import is_remote, shown
from cowfs.storage.nbd.address import Address, parse_address

_NAMES = {
    "nbd://host": Address("", "host"),
    "nbd://host/": Address("", "host"),
    "nbd://": Address(""),
    "NBD://Host:99/a": Address("a", "host", 99),
    "nbd://host//a/b": Address("/a/b", "host"),
    "nbd://[::1]:10810/a%20b%3F": Address("a b?", "::1", 10810),
    "nbd+tcp://host/a": Address("a", "host"),
    "nbd+unix:///?socket=/run/s": Address("", socket="/run/s"),
    "nbd+unix:///a?socket=/run/a+b%20c": Address("a", socket="/run/a+b c"),
    "nbds://host/a": Address("a", "host", tls=True),
    "nbds://host/a?tls-certificates=/etc/pki&tls-hostname=h": Address(
        "a", "host", tls=True, certificates="/etc/pki", hostname="h"
    ),
    "nbds+unix:///a?socket=s&tls-hostname=h": Address("a", socket="s", tls=True, hostname="h"),
    "nbd:host:10810": Address("", "host", 10810),
    "nbd:host:10810:exportname=a:b/c": Address("a:b/c", "host", 10810),
    "nbd:[::1]:10810": Address("", "::1", 10810),
    "nbd:unix:/run/s": Address("", socket="/run/s"),
    "nbd:unix:/run/s:exportname=x": Address("x", socket="/run/s"),
}


@pytest.mark.parametrize("name", _NAMES)
def test_names_and_what_they_stand_for(name: str) -> None:
    address = parse_address(name)
    assert is_remote(name)
    assert address == _NAMES[name]
    assert parse_address(address.uri) == address


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nbd+vsock://1/x", "no way to reach"),
        ("nbd+unix:///x", "is neither"),
        ("nbd+unix://host/x?socket=/s", "is neither"),
        ("nbd://host/x?socket=/s", "is neither"),
        ("nbd+unix:///x?socket=", "no socket"),
        ("nbd+unix:///x?socket=/a%00b", "no socket"),
        (f"nbd+unix:///x?socket=/{'s' * 107}", "fewer than 108 bytes"),
        ("nbd+unix:///x?socket=/a&socket=/b", "twice"),
        ("nbd://host/x?exec=/bin/sh", "does not know"),
        ("nbds://host/x?tls-psk-file=/k", "pre-shared"),
        ("nbds://user@host/x", "user"),
        ("nbd://host/x?tls-certificates=/d", "write nbds"),
        ("nbd://host:0/x", "from 1 to 65535"),
        ("nbd://host:65536/x", "is no NBD URI"),
        ("nbd://host:port/x", "is no NBD URI"),
        ("nbd://[::1/x", "is no NBD URI"),
        ("nbd://host/x#y", "'#'"),
        ("nbd://host/x y", "characters"),
        ("nbd://host/x\ny", "characters"),
        ("nbd://ho%20st/x", "host name"),
        ("nbd://host/a%00b", "no export"),
        (f"nbd://host/{'x' * 4097}", "4096 bytes"),
        ("nbd:host", "is neither"),
        ("nbd:host:", "is neither"),
        ("nbd::10809", "is neither"),
        ("nbd:host:99999", "from 1 to 65535"),
        ("nbd:host:10809:export=x", "is neither"),
        ("nbd:unix:", "no socket"),
    ],
)
def test_names_that_stand_for_nothing(name: str, says: str) -> None:
    with pytest.raises(CowfsError) as caught:
        parse_address(name)
    assert says in str(caught.value)
    assert caught.value.file == shown(name)


@pytest.mark.parametrize(
    "name", ["nbd://user:secret@host/x", "nbds://user:secret@host:port/x", "NBD://:secret@h/x?a=b"]
)
def test_passwords_are_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(CowfsError) as caught:
        parse_address(name)
    assert "secret" not in str(caught.value)


def test_files_may_be_called_so() -> None:
    for name in ("./nbd:x", "/nbd://x", "nbdkit", "nbd", "a/nbd:b", "nbd.raw"):
        assert not is_remote(name)


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_HOSTS = st.from_regex(r"[a-z0-9.-]{1,9}", fullmatch=True)


@given(
    st.builds(Address, _TEXT, _HOSTS, st.integers(1, 65_535), socket=st.none(), tls=st.just(True), certificates=_TEXT)
    | st.builds(Address, _TEXT, st.just("localhost"), st.just(10809), _TEXT.filter(bool), tls=st.just(False))
)
def test_every_name_survives_being_written(address: Address) -> None:
    address = address._replace(hostname=None, certificates=address.certificates or None)
    if not address.tls:
        address = address._replace(certificates=None)
    assert parse_address(address.uri) == address


@given(st.text(max_size=60))
def test_no_name_does_anything_but_stand_or_be_refused(text: str) -> None:
    for name in (f"nbd://{text}", f"nbd:{text}", f"nbd+unix:///{text}", f"nbds://{text}"):
        try:
            parse_address(name)
        except CowfsError as error:
            assert error.file == shown(name)
        try:
            backing_source("top", Backing(f"json:{text}", None))
        except CowfsError as error:
            assert error.file == "top"


def test_what_comes_from_a_server_does_not_lead_into_this_host() -> None:
    top = "nbd://evil/x"
    for name in ("/etc/shadow", "base.raw", "file:/etc/shadow"):
        with pytest.raises(NotPermitted, match="comes from a server"):
            backing_source(top, Backing(name, "raw"))
    assert backing_source(top, Backing("nbd://evil/y", "raw")).name == "nbd://evil/y"


def test_headers_have_absolute_paths_only() -> None:
    for name in ("nbd+unix:///x?socket=s", "nbd:unix:s", "nbds://h/x?tls-certificates=d"):
        with pytest.raises(InvalidImage, match="no absolute path"):
            backing_source("top", Backing(name, "raw"))

"""Names of objects: URLs of those schemes of ``fsspec`` that lead over a network, and nowhere else.

Names also come from headers, which anybody may have written, and are shown, logged and written into headers
themselves. So a URL has no credentials in it, in whatever form; those belong into the client's configuration.
"""

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from cowfs.errors import Unsupported, UsageError

#: schemes that lead to a server; fsspec has others, which lead to local files, or combine such
SCHEMES = (
    *("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf"),
    *("ftp", "sftp", "ssh", "smb", "webhdfs", "hdfs", "gdrive", "dropbox", "webdav", "dav", "davs"),
)
#: bytes; longer names are a mistake
MAX_NAME = 4096

_NAME = re.compile(rf"^({'|'.join(SCHEMES)})://", re.IGNORECASE)
_URLS = re.compile(rf"\b({'|'.join(SCHEMES)}|nbds?(\+unix)?)://[^\s'\"()<>]+", re.IGNORECASE)
_USER = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/?#]*@")
#: parameters of a URL's query that are as good as a password, as the large stores and usual servers call them
_SECRETS = re.compile(
    r"^(x-[a-z]+-(signature|credential|security-token)|q-(signature|ak)|awsaccesskeyid|googleaccessid|key-pair-id"
    r"|(.*[_-])?(signature|sig|hmac|token|jwt|secret|pass(word|wd)?|api_?key|hdn(ts|ea|tl))(__)?|auth_?key|key|sv|policy)$",
    re.IGNORECASE,
)


class Address(NamedTuple):
    """Where an object is: the ``scheme`` in small letters, and the ``uri``, as it may be shown and stored."""

    scheme: str
    uri: str
    server: str
    #: the object's name on the server
    export: str
    #: what is asked for: the ``uri``, with the signature where that is left out of it
    link: str

    def absolute(self) -> "Address":
        """Return itself: no working directory matters."""
        return self


def is_address(name: str) -> bool:
    """Whether a name is that of an object; a file of such a name is called ``./http://…``."""
    return _NAME.match(name) is not None


def shown(name: str) -> str:
    """Return a name without the credentials that may be in it."""
    plain = _USER.sub(r"\1…@", name)
    place, rest = _parted(plain)
    return f"{place}{rest[0]}…" if _has_secrets(rest) else plain


def without_credentials(text: str) -> str:
    """Return a sentence in which every URL is as it is `shown`."""
    return _URLS.sub(lambda found: shown(found[0]), text)


def _parted(name: str) -> tuple[str, str]:
    """A URL up to its query or fragment, and the rest, with its sign."""
    place = re.split("[?#]", name, maxsplit=1)[0]
    return place, name[len(place) :]


def _has_secrets(rest: str) -> bool:
    pairs = parse_qsl(re.sub("[?#;]", "&", rest), keep_blank_values=True)
    return any(_SECRETS.match(key) for key, _ in pairs)


def parse_address(name: str, *, fleeting: bool = False) -> Address:
    """Read a URL; ``fleeting`` takes links with a signature, too, which somebody reads once, and records nowhere.

    Raises `UsageError`, or `Unsupported`, with as much of the name as may be shown.
    """
    try:
        return _parse(name, fleeting=fleeting)
    except (UsageError, Unsupported) as error:
        error.file = shown(name)
        raise
    except ValueError as error:
        raise UsageError(f"is no URL: {error}", file=shown(name)) from None


def _parse(name: str, *, fleeting: bool) -> Address:
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise UsageError(f"is too long: a URL has {MAX_NAME} bytes at most")
    if not name.isprintable() or " " in name:
        raise UsageError("has characters that a URL writes as %XX")
    if "::" in name:
        raise Unsupported("leads through one store to another, which cowfs does not follow")
    parts = urlsplit(name)
    is_link = parts.scheme in ("http", "https") and "#" not in name
    if _USER.match(name) is not None or (_has_secrets(_parted(name)[1]) and not is_link):
        raise Unsupported(
            "has credentials in it; they belong into the client's configuration, not into names that everybody sees"
        )
    if _has_secrets(_parted(name)[1]) and not fleeting:
        raise Unsupported(
            "has credentials in it, as links have that expire: it can be read once, by convert or info for instance,"
            " but is not mounted, and not recorded as a backing file; credentials that last belong into the client's"
            " configuration"
        )
    if "#" in name:
        raise UsageError("has a part behind '#', which means nothing here")
    if not parts.hostname or not parts.path.strip("/"):
        raise UsageError("names no object; write SCHEME://SERVER/PATH")
    # a port that is none raises ValueError
    port = parts.port
    link = f"{parts.scheme}://{name.partition('://')[2]}"
    server = parts.hostname if port is None else f"{parts.hostname}:{port}"
    return Address(parts.scheme, shown(link), server, parts.path.strip("/"), link)

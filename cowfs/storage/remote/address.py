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
_USER = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/?#]*@")
#: parameters of a URL's query that are as good as a password, as the large stores and usual servers call them
_SECRETS = re.compile(
    r"^(x-(amz|goog|oss|ms)-(signature|credential|security-token)|awsaccesskeyid|googleaccessid|signature|sig|sv"
    r"|(access_?|auth_?|id_?|private_?)?token|api_?key|key|secret|client_secret|pass(word|wd)?|policy)$",
    re.IGNORECASE,
)


class Address(NamedTuple):
    """Where an object is: the ``scheme`` in small letters, and the ``uri`` whole."""

    scheme: str
    uri: str
    server: str
    #: the object's name on the server
    export: str

    def absolute(self) -> "Address":
        """Return itself: no working directory matters."""
        return self


def is_address(name: str) -> bool:
    """Whether a name is that of an object; a file of such a name is called ``./http://…``."""
    return _NAME.match(name) is not None


def shown(name: str) -> str:
    """Return a name without the credentials that may be in it."""
    plain = _USER.sub(r"\1…@", name)
    return plain.partition("?")[0] + "?…" if "?" in plain and _has_secrets(plain) else plain


def _has_secrets(name: str) -> bool:
    query = name.partition("?")[2].partition("#")[0]
    return any(_SECRETS.match(key) for key, _ in parse_qsl(query, keep_blank_values=True))


def parse_address(name: str) -> Address:
    """Read a URL. Raises `UsageError`, or `Unsupported`, with as much of the name as may be shown."""
    try:
        return _parse(name)
    except (UsageError, Unsupported) as error:
        error.file = shown(name)
        raise
    except ValueError as error:
        raise UsageError(f"is no URL: {error}", file=shown(name)) from None


def _parse(name: str) -> Address:
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise UsageError(f"is too long: a URL has {MAX_NAME} bytes at most")
    if not name.isprintable() or " " in name:
        raise UsageError("has characters that a URL writes as %XX")
    if "::" in name:
        raise Unsupported("leads through one store to another, which cowfs does not follow")
    if _USER.match(name) is not None or _has_secrets(name):
        raise Unsupported(
            "has credentials in it; they belong into the client's configuration, not into names that everybody sees"
        )
    parts = urlsplit(name)
    if "#" in name:
        raise UsageError("has a part behind '#', which means nothing here")
    if not parts.hostname or not parts.path.strip("/"):
        raise UsageError("names no object; write SCHEME://SERVER/PATH")
    # a port that is none raises ValueError
    port = parts.port
    return Address(
        parts.scheme,
        f"{parts.scheme}://{name.partition('://')[2]}",
        parts.hostname if port is None else f"{parts.hostname}:{port}",
        parts.path.strip("/"),
    )

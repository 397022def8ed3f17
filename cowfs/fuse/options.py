"""Mount options: what ``-o`` takes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cowfs.block.detectzeroes import DetectZeroes
from cowfs.block.disk import FLUSH_INTERVAL
from cowfs.block.metacache import DEFAULT_BOUND
from cowfs.errors import UsageError
from cowfs.formats.backingnames import BackingNames
from cowfs.formats.registry import format_named
from cowfs.storage import DEFAULT_NETWORK, Network
from cowfs.units import parse_size

#: bytes; less would have tables read again and again
MIN_CACHE_SIZE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What the mount options say; ``flush_interval`` in seconds, ``mode`` the permission bits of the flat files."""

    read_only: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int = 0o600
    copy_on_read: bool = True
    writeback_cache: bool = True
    format: str | None = None
    snapshot: str | None = None
    flush_interval: float = FLUSH_INTERVAL
    #: bytes of tables that each image file keeps in memory
    cache_size: int = DEFAULT_BOUND
    locking: bool = True
    accept_base: bool = False
    allow_shrink: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    net_timeout: float = DEFAULT_NETWORK.timeout
    net_retry: float = DEFAULT_NETWORK.retry
    net_hold: bool = DEFAULT_NETWORK.hold
    resume_jobs: bool = True
    backing_names: BackingNames = BackingNames.KEEP
    log: str | None = None
    #: flags of mount(2) by their names, passed on as they are
    flags: frozenset[str] = field(default_factory=frozenset)

    @property
    def network(self) -> Network:
        """How long servers are waited for."""
        return Network(self.net_timeout, self.net_retry, self.net_hold)


def _number(text: str) -> int:
    # 2^32 - 1 is no id: system calls take it for "leave it as it is"
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < (1 << 32) - 1):
        raise ValueError(f"is not a number from 0 to {(1 << 32) - 2}")
    return int(text)


def _mode(text: str) -> int:
    if not text or text.strip("01234567") or int(text, 8) > 0o777:
        raise ValueError("is not a mode from 0 to 0777")
    return int(text, 8)


def _interval(text: str) -> float:
    seconds = _pause(text)
    if not seconds:
        raise ValueError("is not a number of seconds")
    return seconds


def _pause(text: str) -> float:
    """Read a number of seconds, which may be none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError("is not a number of seconds")
    return seconds


def _net_error(text: str) -> bool:
    if text not in ("eio", "hold"):
        raise ValueError("is neither eio nor hold")
    return text == "hold"


def _cache_size(text: str) -> int:
    try:
        size = parse_size(text)
    except UsageError:
        size = 0
    if size < MIN_CACHE_SIZE:
        raise ValueError("is not a size of at least 1M")
    return size


def _detect_zeroes(text: str) -> DetectZeroes:
    try:
        return DetectZeroes(text)
    except ValueError:
        raise ValueError("is none of " + ", ".join(DetectZeroes)) from None


def _backing_names(text: str) -> BackingNames:
    try:
        return BackingNames(text)
    except ValueError:
        raise ValueError("is none of " + ", ".join(BackingNames)) from None


#: options with a value: name to field, reader (`ValueError` says what is wrong), line of help
VALUES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "uid": ("uid", _number, "owner of all files, as a number; default: who mounts"),
    "gid": ("gid", _number, "group of all files, as a number; default: that of who mounts"),
    "mode": ("mode", _mode, "permission bits of the flat files, in octal; default 600"),
    "format": ("format", lambda text: format_named(text).name, "format of the images; default: told from the file"),
    "snapshot": ("snapshot", str, "internal snapshot, by id or name, that the images are shown as of, read-only"),
    "flush-interval": ("flush_interval", _interval, "seconds between flushes where no fsync comes; default 5"),
    "cache-size": ("cache_size", _cache_size, "bytes of tables in memory, for each image file; default 32M"),
    "net-timeout": ("net_timeout", _interval, "seconds that a server may take for one request; default 30"),
    "net-retry": ("net_retry", _pause, "seconds for which a server that is away is waited for; default 60"),
    "net-error": ("net_hold", _net_error, "then: eio fails what needs the server, the default; hold waits on"),
    "detect-zeroes": ("detect_zeroes", _detect_zeroes, "off, on or unmap: what writes of nothing but zeros become"),
    "backing-names": (
        "backing_names",
        _backing_names,
        "keep, relative or absolute: names of backing files that jobs and snapshots record",
    ),
    "log": ("log", lambda text: str(Path(text).absolute()), "file for messages of the server; default: syslog"),
}

#: options without a value: name to what they set, line of help
SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "ro": ({"read_only": True}, "nothing can be written, not even a control file"),
    "rw": ({"read_only": False}, "the opposite; the default"),
    "allow_other": ({"allow_other": True}, "users other than the one who mounts may enter"),
    "copy-on-read": ({"copy_on_read": True}, "what a read fetches from below stays in the overlay; the default"),
    "no-copy-on-read": ({"copy_on_read": False}, "it does not"),
    "accept-base": ({"accept_base": True}, "backing files that have changed are taken for what they should be"),
    "allow-shrink": ({"allow_shrink": True}, "truncate(2) may make disks smaller, and what was there is lost"),
    "lock": ({"locking": True}, "other programs are kept from using the images in ways that clash; the default"),
    "nolock": ({"locking": False}, "they are not, and not asked either"),
    "resume-jobs": ({"resume_jobs": True}, "jobs that were running when the last mount ended go on; the default"),
    "no-resume-jobs": ({"resume_jobs": False}, "they do not, and can be resumed by a later mount"),
    "writeback-cache": ({"writeback_cache": True}, "buffered writes wait in the kernel's page cache; the default"),
    "no-writeback-cache": ({"writeback_cache": False}, "every write reaches the server before it returns"),
}

#: passed on to mount(2)
FLAGS = ("noatime", "atime", "nodev", "dev", "nosuid", "suid", "noexec", "exec", "sync", "async", "dirsync")

#: words that mean something to mount(8), to the init system, or to other FUSE file systems, but nothing here
IGNORED = (
    *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail", "relatime"),
    *("norelatime", "strictatime", "nodiratime", "diratime", "lazytime", "nolazytime", "silent", "loud"),
    *("default_permissions", "nonempty"),
)


def parse_options(texts: Iterable[str]) -> Settings:
    """Read comma-separated options; of two that contradict each other the last counts.

    Raises `UsageError` for one that is unknown or has a bad value.
    """
    settings = Settings()
    for word in (word for text in texts for word in text.split(",") if word):
        name, sign, value = word.partition("=")
        if name in VALUES and sign:
            attribute, read, _ = VALUES[name]
            try:
                settings = replace(settings, **{attribute: read(value)})
            except ValueError as error:
                raise UsageError(f"mount option {name}: '{value}' {error}") from None
        elif word in SWITCHES:
            settings = replace(settings, **SWITCHES[word][0])
        elif word in FLAGS:
            settings = replace(settings, flags=settings.flags | {word})
        elif word not in IGNORED and not name.startswith(("x-", "X-", "comment")):
            raise UsageError(_complaint(name, sign))
    return settings


def _complaint(name: str, sign: str) -> str:
    if name in VALUES:
        return f"mount option {name} needs a value: {name}=…"
    if sign and (name in SWITCHES or name in FLAGS):
        return f"mount option {name} takes no value"
    return f"unknown mount option '{name}'"

"""Objects of S3, and of whatever other stores ``fsspec`` knows."""

import asyncio
import errno
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import trio

from cowfs.errors import CowfsError, NotFound, StorageError
from cowfs.storage.remote.address import Address
from cowfs.storage.remote.bridge import in_loop, require_module
from cowfs.storage.remote.store import PIECE, AwayError, Facts, Store, changed, misbehaved, refused, require_same

#: threads for stores that know no event loop
_THREADS = trio.CapacityLimiter(16)
#: what stores call that which changes with the content; all that are there count
_VERSIONS = ("ETag", "etag", "e_tag", "generation", "version_id", "VersionId", "md5Hash", "content_md5", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "modify", "modificationTime", "timeModified")
#: errors of the system that another attempt does not mend
_FINAL = (errno.EINVAL, errno.ENOSYS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def make_system(address: Address) -> Any:
    """Set up what ``fsspec`` has for a scheme. Raises `Unsupported` if a package for it is missing."""
    fsspec = require_module("fsspec", "reading from a store")
    # as an attribute, it is something else
    registry = require_module("fsspec.registry", "reading from a store")
    module = registry.known_implementations.get(address.scheme, {}).get("class", "")
    if address.scheme not in registry.registry and module:
        require_module(module.rpartition(".")[0], f"reading from {address.scheme}://")
    try:
        return fsspec.filesystem(address.scheme)
    except (ValueError, ImportError, OSError) as error:
        raise StorageError(f"cannot be reached: {_reason(error)}", errno=errno.EIO) from None


class S3Store(Store):
    """One object of S3, or of what talks like it: each request asks for the version that was there at first."""

    def __init__(self, address: Address, timeout: float) -> None:
        self._system = make_system(address)
        self._timeout = timeout
        bucket, key, version = self._system.split_path(address.uri)
        self._object = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})

    async def look(self, length: int) -> tuple[Facts, bytes]:
        """``HeadObject``; the content comes later."""
        return Facts(*await self._call(self._head())), b""

    async def fetch(self, facts: Facts, start: int, end: int) -> bytes:
        """``GetObject`` with a range, and the ETag that the answer must have."""
        data: bytes = await self._call(self._get(facts, start, end))
        return data

    async def close(self) -> None:
        """Nothing: ``s3fs`` shares connections between all who use the same account."""

    async def _call(self, work: Any) -> Any:
        try:
            return await in_loop(work)
        except (AwayError, CowfsError):
            raise
        except Exception as error:  # noqa: BLE001
            raise translated(error, self._timeout) from None

    # -- in the loop of fsspec

    async def _head(self) -> tuple[int, str]:
        answer = await asyncio.wait_for(self._system._call_s3("head_object", **self._object), self._timeout)
        return _size(answer.get("ContentLength")), str(answer.get("ETag", ""))

    async def _get(self, facts: Facts, start: int, end: int) -> bytes:
        match = {"IfMatch": facts.version} if facts.version else {}
        work = self._system._call_s3("get_object", **self._object, **match, Range=f"bytes={start}-{end - 1}")
        answer = await asyncio.wait_for(work, self._timeout)
        body = answer["Body"]
        try:
            total = str(answer.get("ContentRange", "")).rpartition("/")[2]
            require_same(facts, Facts(_size(total), str(answer.get("ETag", ""))))
            if answer["ContentRange"] != f"bytes {start}-{end - 1}/{facts.size}":
                raise misbehaved("sends another part of the object than it was asked for")
            return await self._body(body, end - start)
        finally:
            body.close()

    async def _body(self, body: Any, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = await asyncio.wait_for(body.read(min(PIECE, length - len(data))), self._timeout)
            if not part:
                raise AwayError("it has sent less than it said")
            data += part
        return bytes(data)


class AnyStore(Store):
    """An object of any other store: ``fsspec`` gives ranges without saying of which version, so it is asked after each.

    What came before the store still has the version of the beginning is of that version.
    """

    def __init__(self, address: Address, timeout: float) -> None:
        self._system = make_system(address)
        self._timeout = timeout
        self._path = self._system._strip_protocol(address.uri)

    async def look(self, length: int) -> tuple[Facts, bytes]:
        """What the store says of the object."""
        info = await self._call("info")
        if not isinstance(info, Mapping) or info.get("type", "file") != "file":
            raise StorageError("is no object with content", errno=errno.EINVAL)
        names = [name for name in _VERSIONS if info.get(name)] or [name for name in _TIMES if info.get(name)]
        return Facts(_size(info.get("size")), ";".join(f"{name}={info[name]}" for name in names)), b""

    async def fetch(self, facts: Facts, start: int, end: int) -> bytes:
        """Read, and see whether the object is still the same."""
        data: bytes = await self._call("cat_file", start=start, end=end)
        require_same(facts, (await self.look(0))[0])
        if len(data) != end - start:
            raise AwayError(
                "it has sent less than it was asked for" if len(data) < end - start else "it has sent too much"
            )
        return data

    async def close(self) -> None:
        """Nothing: ``fsspec`` shares connections."""

    async def _call(self, name: str, **words: Any) -> Any:
        self._system.invalidate_cache()
        try:
            if getattr(self._system, "async_impl", False):
                return await in_loop(self._looped(name, words))
            call = partial(getattr(self._system, name), self._path, **words)
            with trio.fail_after(self._timeout):
                return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=_THREADS)
        except (AwayError, CowfsError):
            raise
        except Exception as error:  # noqa: BLE001
            raise translated(error, self._timeout) from None

    async def _looped(self, name: str, words: Mapping[str, Any]) -> Any:
        # made only now: one that was made and then cancelled before it began would be one that nobody awaits
        work = getattr(self._system, f"_{name}")(self._path, **words)
        return await asyncio.wait_for(work, self._timeout)


def _size(value: object) -> int:
    try:
        size = int(str(value))
    except ValueError:
        raise misbehaved("does not say how large the object is") from None
    if not 0 <= size < 1 << 63:
        raise misbehaved("says that the object has a size that none can have")
    return size


def translated(error: Exception, timeout: float) -> Exception:
    """Return what an error of ``fsspec`` or below it means. Its text may have more in it than may be seen."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, Mapping):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 412:
            return changed("the store calls it another version")
        if status:
            return refused(status)
    if isinstance(error, (asyncio.TimeoutError, TimeoutError, trio.TooSlowError)):
        return AwayError(f"it has not answered for {timeout:g} seconds")
    if isinstance(error, FileNotFoundError):
        return NotFound("there is no such object")
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return refused(403)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 600:
        return refused(status)
    if isinstance(error, OSError) and error.errno in _FINAL:
        return StorageError(f"the store refuses: {os.strerror(error.errno)}", errno=errno.EIO)
    if isinstance(error, (TypeError, NotImplementedError, ValueError)):
        return StorageError(f"cannot be read by parts ({type(error).__name__})", errno=errno.EIO)
    return AwayError(_reason(error))


def _reason(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if isinstance(number, int) else type(error).__name__

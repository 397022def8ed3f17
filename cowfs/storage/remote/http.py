"""Objects of HTTP servers: ranged requests (RFC 9110, section 14), over the session that ``fsspec`` sets up.

fsspec's own reading takes whatever a server sends for the range that was asked for; here each answer is looked at.
"""

import asyncio
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from cowfs.errors import Unsupported
from cowfs.storage.remote.address import Address
from cowfs.storage.remote.bridge import in_loop, require_module
from cowfs.storage.remote.mirrors import Answer, Mirrors, OtherVersionError
from cowfs.storage.remote.store import PIECE, AwayError, Facts, Store, changed, misbehaved, refused, require_same

_CONTENT_RANGE = re.compile(r"^bytes +(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})$")
#: bytes of a socket that are read ahead
_READ_BUFFER = 1 << 20


class HttpStore(Store):
    """One URL. Redirections are followed, but not from TLS to where there is none."""

    def __init__(self, address: Address, timeout: float) -> None:
        self._aiohttp = require_module("aiohttp", "reading from a server")
        fsspec = require_module("fsspec", "reading from a server")
        self._address = address
        self._timeout = timeout
        configured = fsspec.config.conf.get(address.scheme, {}).get("client_kwargs", {})
        # ~/.netrc, and the proxies that the environment names
        options = {"trust_env": True, **configured}
        # asynchronous: nothing of it is closed but by `close`, from the loop where it is used
        self._system: Any = fsspec.filesystem(
            address.scheme, skip_instance_cache=True, asynchronous=True, client_kwargs=options
        )
        # what was signed is asked for as it was signed
        self._mirrors: Mirrors | None = None
        is_signed = address.link != address.uri
        yarl = require_module("yarl", "reading from a server")
        self._url: Any = yarl.URL(address.link, encoded=True) if is_signed else self._system.encode_url(address.link)

    async def look(self, length: int) -> tuple[Facts, bytes]:
        """Ask for the first bytes: what the answer says of the whole is true of what later answers are parts of."""
        facts, data, answer = await self._request(None, self._url, 0, length)
        self._mirrors = Mirrors(facts, answer, partial(self._sample, facts))
        self._mirrors.remember(0, data)
        return facts, data

    async def fetch(self, facts: Facts, start: int, end: int) -> bytes:
        """One request; or more, if the answer says that it is of another version."""
        assert self._mirrors is not None
        while True:
            try:
                _, data, _ = await self._request(facts, self._url, start, end)
            except OtherVersionError as other:
                await self._mirrors.look(other.answer)
                self.is_fickle = self._mirrors.is_fickle
            else:
                if self.is_fickle:
                    await self._mirrors.probe(self._url)
                self._mirrors.remember(start, data)
                return data

    async def _sample(self, facts: Facts, url: Any, start: int, end: int) -> tuple[bytes, Answer]:
        """Ask for a part, of whatever version there is now."""
        now, data, answer = await self._request(None, url, start, end)
        if now.size != facts.size:
            require_same(facts, now)
        return data, answer

    async def close(self) -> None:
        """Close the session."""
        await in_loop(self._close())

    async def _close(self) -> None:
        session, self._system._session = self._system._session, None
        if session is not None:
            await session.close()

    async def _request(self, known: Facts | None, url: Any, start: int, end: int) -> tuple[Facts, bytes, Answer]:
        """Ask for a part of a version that is known, or of any."""
        try:
            return await in_loop(self._get(known, url, start, end))
        except asyncio.TimeoutError:
            raise AwayError(f"it has not answered for {self._timeout:g} seconds") from None
        except self._aiohttp.ClientConnectorCertificateError as error:
            reason = getattr(error.certificate_error, "verify_message", "") or "it cannot be verified"
            raise misbehaved(f"has a certificate that is not accepted: {reason}") from None
        except self._aiohttp.ClientConnectorError as error:
            raise AwayError(f"cannot connect: {_reason(error)}") from None
        except self._aiohttp.InvalidURL:
            raise Unsupported("is no URL that can be asked for") from None
        except self._aiohttp.TooManyRedirects:
            raise misbehaved("sends from one URL to the next without end") from None
        except (self._aiohttp.ClientError, OSError) as error:
            # their texts may have URLs of other servers in them, with signatures
            raise AwayError(f"the connection was lost ({type(error).__name__})") from None

    # -- in the loop of fsspec

    async def _get(self, known: Facts | None, url: Any, start: int, end: int) -> tuple[Facts, bytes, Answer]:
        session = await self._system.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        # of which another server would understand nothing
        is_one = known is not None and not known.place and self._mirrors is not None and self._mirrors.is_one
        if known is not None and is_one and known.version.startswith('"'):
            headers["If-Range"] = known.version
        request = session.get(
            url,
            headers=headers,
            timeout=self._aiohttp.ClientTimeout(total=None),
            read_bufsize=_READ_BUFFER,
            raise_for_status=False,
        )
        response = await asyncio.wait_for(request, self._timeout)
        try:
            facts, stop = self._understood(response, known, start, end)
            return facts, await self._body(response, stop - start), _answer(response)
        finally:
            # which keeps the connection if all of the answer has been read
            response.close()

    def _understood(self, response: Any, known: Facts | None, start: int, end: int) -> tuple[Facts, int]:
        """Check an answer before its body; the object, and where the range ends that comes."""
        headers: Mapping[str, str] = response.headers
        if self._address.scheme == "https" and response.url.scheme != "https":
            raise misbehaved("leads to a place without TLS")
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise misbehaved("sends it compressed, although it was asked not to")
        _, place, version = _answer(response)
        found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if response.status == 200:
            return self._whole(response, known)
        if response.status == 416 and found is not None and found[1] is None:
            facts = Facts(int(found[3]), known.version if known else version, place)
            if known is None and not facts.size:
                return facts, start
            if known is not None:
                require_same(known, facts)
        if response.status == 412:
            raise changed("the store calls it another version")
        if response.status != 206:
            raise refused(response.status)
        if found is None or found[1] is None:
            raise misbehaved("sends a part of the object without saying which, and of how much")
        facts = Facts(int(found[3]), version, place)
        if known is not None:
            self._require_known(known, facts, response)
        stop = min(end, facts.size)
        if (int(found[1]), int(found[2]) + 1) != (start, stop):
            raise misbehaved("sends another part of the object than it was asked for")
        if headers.get("Content-Length", str(stop - start)) != str(stop - start):
            raise misbehaved("sends a part of the object with another length than it says")
        return facts, stop

    def _require_known(self, known: Facts, now: Facts, response: Any) -> None:
        """Raise if an answer is of another version than those that have been found to be the object."""
        if now.size == known.size and now.version != known.version:
            if self._mirrors is None or not self._mirrors.knows(_answer(response)):
                raise OtherVersionError(_answer(response))
            return
        require_same(known, now)

    def _whole(self, response: Any, known: Facts | None) -> tuple[Facts, int]:
        """Understand an answer that is all of the object."""
        _, place, version = _answer(response)
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else None
        if known is not None:
            now = Facts(known.size if size is None else size, version)
            if now.size == known.size and version != known.version and "If-Range" in response.request_info.headers:
                raise OtherVersionError(_answer(response))
            self._require_known(known, now, response)
        elif size == 0:
            return Facts(0, version, place), 0
        raise Unsupported("the server sends only the whole of it, not the parts that are asked for")

    async def _body(self, response: Any, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            size = min(PIECE, length - len(data))
            try:
                data += await asyncio.wait_for(response.content.readexactly(size), self._timeout)
            except asyncio.IncompleteReadError:
                raise AwayError("it has sent less than it said") from None
        # nothing can follow, or the length would be another; this is how the connection learns that it is free
        if await asyncio.wait_for(response.content.read(1), self._timeout):
            raise misbehaved("sends more than it says")
        return bytes(data)


def _answer(response: Any) -> Answer:
    """What an answer says of where it comes from; places are known by server and path, as queries may change."""
    url = response.url
    place = f"{url.scheme}://{url.host}:{url.port}{url.raw_path}" if response.history else ""
    return Answer(url, place, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _reason(error: Exception) -> str:
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or type(cause).__name__

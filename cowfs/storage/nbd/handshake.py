"""What client and server agree on before the first request: TLS, structured replies, the export.

Section "Fixed newstyle negotiation". A server can say as much as it likes here, so everything has its bound, and the
caller sets a deadline to it all.
"""

from dataclasses import dataclass
from typing import NamedTuple

from cowfs.errors import NotFound, StorageError
from cowfs.storage import host
from cowfs.storage.nbd import protocol as nbd
from cowfs.storage.nbd.address import Address
from cowfs.storage.nbd.protocol import Export
from cowfs.storage.nbd.transport import (
    Inbox,
    LostError,
    MisbehavedError,
    PlainTransport,
    TlsTransport,
    connect,
    tls_context,
)

#: bytes of one reply to an option
MAX_REPLY = 32 << 10
#: replies to one option
MAX_REPLIES = 64
#: exports that a server may list
MAX_EXPORTS = 10_000
#: names in a sentence that says which exports there are
_SHOWN = 8

_REFUSALS = {
    nbd.REP_ERR_UNSUP: "it does not know that",
    nbd.REP_ERR_POLICY: "its policy forbids it",
    nbd.REP_ERR_INVALID: "the request is invalid",
    nbd.REP_ERR_PLATFORM: "its platform cannot do that",
    nbd.REP_ERR_TLS_REQD: "it demands TLS; write nbds:// or nbds+unix://",
    nbd.REP_ERR_UNKNOWN: "there is no such export",
    nbd.REP_ERR_SHUTDOWN: "it is shutting down",
    nbd.REP_ERR_BLOCK_SIZE_REQD: "it insists on its block sizes",
    nbd.REP_ERR_TOO_BIG: "the request is too big for it",
}


class _Reply(NamedTuple):
    type: int
    data: bytes


class RefusedError(StorageError):
    """The server understands an option, and says no; ``type`` is its reply."""

    def __init__(self, type: int, data: bytes) -> None:
        text = readable(data)
        reason = _REFUSALS.get(type, f"error {type & ~nbd.REP_FLAG_ERROR}")
        super().__init__(
            f"the NBD server refuses: {reason}" + (f" ('{text}')" if text else ""), errno=StorageError.errno
        )
        self.type = type


def readable(data: bytes | memoryview) -> str:
    """Make a short line of a server's text."""
    text = " ".join(bytes(data[: nbd.MAX_STRING]).decode(errors="replace").split())
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


@dataclass
class Agreed:
    """A connection that is ready for requests."""

    inbox: Inbox
    export: Export


async def open_export(address: Address) -> Agreed:
    """Connect, and go on to requests to an export.

    Raises `LostError` where another attempt may do better, `NotFound` if there is no such export, or `StorageError`.
    """
    negotiation = await _Negotiation.begin(address)
    try:
        return await negotiation.go()
    except BaseException:
        negotiation.inbox.transport.abort()
        raise


async def read_exports(address: Address) -> list[tuple[str, str]]:
    """Return names and descriptions of what a server has, as far as it tells; raises as `open_export` does."""
    negotiation = await _Negotiation.begin(address)
    try:
        exports = await negotiation.list()
        await negotiation.send(nbd.OPT_ABORT, b"")
        return exports
    finally:
        negotiation.inbox.transport.abort()


class _Negotiation:
    def __init__(self, address: Address, transport: PlainTransport) -> None:
        self._address = address
        self._name = address.export.encode("utf-8", "surrogateescape")
        self.inbox = Inbox(transport)
        self._no_zeroes = False

    @classmethod
    async def begin(cls, address: Address) -> "_Negotiation":
        """Connect, and agree on the protocol and on TLS."""
        # certificates are looked at first: nobody should learn of a connection that comes to nothing
        context = await host.ask(tls_context, address, file=address.uri) if address.tls else None
        transport = await connect(address)
        self = cls(address, transport)
        try:
            await self._greet()
            if context is not None:
                await self._demand(nbd.OPT_STARTTLS, b"")
                if not self.inbox.is_empty:
                    # whatever was injected before TLS must not pass for what came through it
                    raise MisbehavedError("goes on in plain text where TLS must begin")
                tls = TlsTransport(transport, context, address.hostname or address.host)
                await tls.start()
                self.inbox = Inbox(tls)
        except BaseException:
            transport.abort()
            raise
        return self

    async def _greet(self) -> None:
        # an old server's greeting is longer, but starts alike
        start = bytes(await self.inbox.exactly(16))
        if start[:8] != nbd.INIT_MAGIC:
            raise MisbehavedError("is none: it greets in another way")
        if start[8:] != nbd.OPTION_MAGIC:
            if start[8:] == nbd.OLDSTYLE_MAGIC.rjust(8, b"\0"):
                raise MisbehavedError("only speaks the old protocol, without options, which went out of use in 2012")
            raise MisbehavedError("is none: it greets in another way")
        flags = int.from_bytes(await self.inbox.exactly(2), "big")
        if not flags & nbd.FLAG_FIXED_NEWSTYLE:
            raise MisbehavedError("does not speak the fixed newstyle protocol")
        self._no_zeroes = bool(flags & nbd.FLAG_NO_ZEROES)
        answer = nbd.FLAG_FIXED_NEWSTYLE | (nbd.FLAG_NO_ZEROES if self._no_zeroes else 0)
        await self.inbox.transport.send([memoryview(nbd.CLIENT_FLAGS.pack(answer))])

    # -- options

    async def send(self, option: int, data: bytes) -> None:
        """Ask for something."""
        head = nbd.OPTION.pack(nbd.OPTION_MAGIC, option, len(data))
        await self.inbox.transport.send([memoryview(head + data)])

    async def _reply(self, option: int) -> _Reply:
        head = await self.inbox.exactly(nbd.OPTION_REPLY.size)
        magic, echoed, type, length = nbd.OPTION_REPLY.unpack(head)
        if magic != nbd.OPTION_REPLY_MAGIC:
            raise MisbehavedError("sends what is no reply to an option")
        if echoed != option:
            raise MisbehavedError("answers an option that was not asked for")
        if length > MAX_REPLY:
            raise MisbehavedError(f"answers an option with {length} bytes")
        return _Reply(type, bytes(await self.inbox.exactly(length)))

    async def _ask(self, option: int, data: bytes, most: int = MAX_REPLIES) -> list[_Reply]:
        """Send an option; the replies before the one that ends them. Raises `RefusedError`."""
        await self.send(option, data)
        replies: list[_Reply] = []
        while True:
            reply = await self._reply(option)
            if reply.type == nbd.REP_ACK:
                return replies
            if reply.type == nbd.REP_ERR_SHUTDOWN:
                raise LostError("the server is shutting down")
            if reply.type & nbd.REP_FLAG_ERROR:
                raise RefusedError(reply.type, reply.data)
            replies.append(reply)
            if len(replies) > most:
                raise MisbehavedError("never comes to an end with its answers")

    async def _demand(self, option: int, data: bytes) -> None:
        if await self._ask(option, data):
            raise MisbehavedError("answers an option in a way that makes no sense")

    async def _wish(self, option: int, data: bytes) -> list[_Reply] | None:
        """Like `_ask`; None if the server does not want to."""
        try:
            return await self._ask(option, data)
        except RefusedError as error:
            if error.type == nbd.REP_ERR_TLS_REQD:
                raise
            return None

    async def list(self) -> list[tuple[str, str]]:
        """`OPT_LIST`: names and descriptions."""
        exports: list[tuple[str, str]] = []
        for type, data in await self._ask(nbd.OPT_LIST, b"", MAX_EXPORTS):
            length = int.from_bytes(data[:4], "big")
            if type != nbd.REP_SERVER or len(data) < 4 or length > min(len(data) - 4, nbd.MAX_STRING):
                raise MisbehavedError("lists its exports in a way that makes no sense")
            name = data[4 : 4 + length].decode("utf-8", "surrogateescape")
            exports.append((name, readable(data[4 + length :])))
        return exports

    # -- the export

    async def go(self) -> Agreed:
        """Agree on what replies look like, and end the negotiation."""
        structured = await self._wish(nbd.OPT_STRUCTURED_REPLY, b"") is not None
        context = await self._choose_context() if structured else None
        export = Export(0, 0, structured, context)
        asked = len(self._name).to_bytes(4, "big") + self._name + bytes([0, 1, 0, nbd.INFO_BLOCK_SIZE])
        try:
            replies = await self._ask(nbd.OPT_GO, asked)
        except RefusedError as error:
            if error.type == nbd.REP_ERR_UNSUP:
                return Agreed(self.inbox, _checked(await self._go_the_old_way(export)))
            if error.type == nbd.REP_ERR_UNKNOWN:
                raise NotFound(await self._missing()) from error
            raise
        return Agreed(self.inbox, _checked(_with_infos(export, replies)))

    async def _go_the_old_way(self, export: Export) -> Export:
        """`OPT_EXPORT_NAME`, to which there is no reply but the export."""
        await self.send(nbd.OPT_EXPORT_NAME, self._name)
        try:
            size, flags = nbd.EXPORT_FACTS.unpack(await self.inbox.exactly(nbd.EXPORT_FACTS.size))
        except LostError as error:
            raise LostError(f"{error}, as old servers do if there is no such export") from error
        if not self._no_zeroes:
            await self.inbox.exactly(nbd.EXPORT_PADDING)
        return export._replace(size=size, flags=flags)

    async def _choose_context(self) -> int | None:
        """Ask for ``base:allocation``; the number that replies have for it."""
        asked = b"".join(
            [
                len(self._name).to_bytes(4, "big"),
                self._name,
                (1).to_bytes(4, "big"),
                len(nbd.BASE_ALLOCATION).to_bytes(4, "big"),
                nbd.BASE_ALLOCATION,
            ]
        )
        chosen = None
        for type, data in await self._wish(nbd.OPT_SET_META_CONTEXT, asked) or []:
            if type != nbd.REP_META_CONTEXT or len(data) < 4 or data[4:] != nbd.BASE_ALLOCATION or chosen is not None:
                raise MisbehavedError("offers metadata that was not asked for")
            chosen = int.from_bytes(data[:4], "big")
        return chosen

    async def _missing(self) -> str:
        """Say that there is no such export, and which ones there are if the server tells."""
        sentence = f"the NBD server has no export '{readable(self._name)}'"
        try:
            names = [name for name, _ in await self.list()]
        except RefusedError:
            return sentence
        shown = ", ".join(f"'{readable(name.encode('utf-8', 'surrogateescape'))}'" for name in names[:_SHOWN])
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{sentence}; it has {shown}{more}" if names else sentence


def _with_infos(export: Export, replies: list[_Reply]) -> Export:
    """Enter what the replies to `OPT_GO` say."""
    found: set[int] = set()
    for type, data in replies:
        if type != nbd.REP_INFO or len(data) < 2:
            raise MisbehavedError("describes its export in a way that makes no sense")
        (info,) = nbd.INFO_TYPE.unpack(data[:2])
        layout = {nbd.INFO_EXPORT: nbd.EXPORT_FACTS, nbd.INFO_BLOCK_SIZE: nbd.BLOCK_SIZES}.get(info)
        if layout is None:
            continue
        if len(data) != 2 + layout.size or info in found:
            raise MisbehavedError("describes its export in a way that makes no sense")
        found.add(info)
        if info == nbd.INFO_EXPORT:
            size, flags = layout.unpack(data[2:])
            export = export._replace(size=size, flags=flags)
        else:
            minimum, preferred, maximum = layout.unpack(data[2:])
            export = export._replace(minimum=minimum, preferred=preferred, maximum=maximum)
    if nbd.INFO_EXPORT not in found:
        raise MisbehavedError("does not say how large its export is")
    return export


def _checked(export: Export) -> Export:
    """Refuse what cannot be, and bound the rest."""
    if export.size >= 1 << 63:
        raise MisbehavedError(f"says that its export has {export.size} bytes")
    if not export.flags & nbd.HAS_FLAGS:
        raise MisbehavedError("does not say what its export can do")
    least, preferred, most = export.minimum, export.preferred, export.maximum
    powers = not (least & least - 1 or preferred & preferred - 1)
    if not (powers and 1 <= least <= 1 << 16 and preferred >= least and most >= least):
        raise MisbehavedError(f"has block sizes that make no sense: {least}, {preferred}, {most}")
    if export.size % least:
        raise MisbehavedError(f"has an export of {export.size} bytes in blocks of {least}")
    return export._replace(maximum=min(most, nbd.DEFAULT_MAXIMUM) // least * least)

"""Numbers and structures of the NBD protocol. All integers are big-endian."""

import errno
import struct
from typing import NamedTuple

# -- handshake (section "Newstyle negotiation")

GREETING = struct.Struct(">8s8sH")
INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OLDSTYLE_MAGIC = bytes.fromhex("00420281861253")

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

CLIENT_FLAGS = struct.Struct(">I")
#: magic; option; length of its data
OPTION = struct.Struct(">8sII")
#: magic; option; type; length of its data
OPTION_REPLY = struct.Struct(">QIII")
OPTION_REPLY_MAGIC = 0x3E889045565A9

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_FLAG_ERROR = 1 << 31
REP_ERR_UNSUP = REP_FLAG_ERROR | 1
REP_ERR_POLICY = REP_FLAG_ERROR | 2
REP_ERR_INVALID = REP_FLAG_ERROR | 3
REP_ERR_PLATFORM = REP_FLAG_ERROR | 4
REP_ERR_TLS_REQD = REP_FLAG_ERROR | 5
REP_ERR_UNKNOWN = REP_FLAG_ERROR | 6
REP_ERR_SHUTDOWN = REP_FLAG_ERROR | 7
REP_ERR_BLOCK_SIZE_REQD = REP_FLAG_ERROR | 8
REP_ERR_TOO_BIG = REP_FLAG_ERROR | 9

#: the answer to `OPT_EXPORT_NAME`, and the bytes of zeros that may follow it
EXPORT_FACTS = struct.Struct(">QH")
EXPORT_PADDING = 124

INFO_EXPORT = 0
INFO_BLOCK_SIZE = 3
INFO_TYPE = struct.Struct(">H")
#: minimum; preferred; maximum, in bytes
BLOCK_SIZES = struct.Struct(">III")

#: name of the metadata context that tells holes from data
BASE_ALLOCATION = b"base:allocation"

# -- transmission

HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
CAN_MULTI_CONN = 1 << 8

#: magic; flags; type; cookie; offset; length
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7
#: what leaves something else behind than was there before
CHANGES = (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES)

#: of `CMD_BLOCK_STATUS` on ``base:allocation``: takes no space; reads as zeros
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

#: magic; error; cookie
SIMPLE_REPLY = struct.Struct(">IIQ")
SIMPLE_REPLY_MAGIC = 0x67446698
#: magic; flags; type; cookie; length of what follows
CHUNK = struct.Struct(">IHHQI")
CHUNK_MAGIC = 0x668E33EF

CHUNK_DONE = 1 << 0

CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_FLAG_ERROR = 1 << 15
CHUNK_ERROR_OFFSET = CHUNK_FLAG_ERROR | 2

OFFSET = struct.Struct(">Q")
#: offset; length
HOLE = struct.Struct(">QI")
#: error; length of the text that follows
ERROR = struct.Struct(">IH")
CONTEXT = struct.Struct(">I")
#: length; flags
DESCRIPTOR = struct.Struct(">II")

#: bytes that any text of a server may have (section "Values")
MAX_STRING = 4096
#: bytes that a request may ask for if the server does not say (section "Block size constraints")
DEFAULT_MAXIMUM = 32 << 20

#: numbers that go over the wire, whatever the server's system (section "Error values")
ERRNOS = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}


class Export(NamedTuple):
    """What a server says of an export: bytes, transmission flags, block sizes in bytes.

    ``context`` is the number of ``base:allocation`` in replies, None if the server does not tell holes from data.
    """

    size: int
    flags: int
    structured: bool
    context: int | None
    minimum: int = 1
    preferred: int = 4096
    maximum: int = DEFAULT_MAXIMUM

    @property
    def read_only(self) -> bool:
        """Whether the server refuses all writes."""
        return bool(self.flags & READ_ONLY)

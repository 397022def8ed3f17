"""Names that are made from the names of other files, and lie beside them."""

import os

import xxhash

#: bytes; what Linux and its file systems allow for one name
NAME_MAX = 255


def derived_name(path: str, suffix: str) -> str:
    """Return the path of the file that belongs to another one: its name with a suffix.

    If that were too long, the end of the name gives way to a digest of all of it, so that no two names get the same.
    """
    folder, name = os.path.split(path)
    raw = os.fsencode(name)
    if len(raw) + len(os.fsencode(suffix)) > NAME_MAX:
        end = f"-{xxhash.xxh3_64_hexdigest(raw)}"
        head = raw[: NAME_MAX - len(end) - len(os.fsencode(suffix))]
        while head and raw[len(head)] & 0xC0 == 0x80:
            # no character is cut in two
            head = head[:-1]
        name = os.fsdecode(head) + end
    return os.path.join(folder, name + suffix)  # noqa: PTH118

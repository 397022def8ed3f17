"""Sizes as people write and read them, the way ``qemu-img`` does."""

from cowfs.errors import UsageError

_SUFFIXES = "bkmgtpe"


def parse_size(text: str) -> int:
    """Bytes from ``10``, ``64K``, ``1.5G``; suffixes ``b k M G T P E`` are powers of 1024, in either case.

    Raises `UsageError` for anything else, also for what is negative or no whole number of bytes.
    """
    number, power = text.strip(), 0
    if number and number[-1].lower() in _SUFFIXES:
        power = _SUFFIXES.index(number[-1].lower())
        number = number[:-1]
    whole, point, fraction = number.partition(".")
    if not (whole + fraction).isdecimal() or not (whole + fraction).isascii() or (point and not (whole and fraction)):
        raise UsageError(f"'{text}' is not a size; write a number with an optional suffix k, M, G or T")
    scaled = int(whole + fraction) << 10 * power
    denominator: int = 10 ** len(fraction)
    size, rest = divmod(scaled, denominator)
    if rest and not power:
        raise UsageError(f"'{text}' is not a whole number of bytes")
    if size >= 1 << 63:
        raise UsageError(f"'{text}' is too large")
    return size


def parse_new_size(text: str, current: int) -> int:
    """Bytes that a size becomes: ``10G``, or by how much it grows or shrinks, ``+1G``, ``-512M``.

    Raises `UsageError`, also if nothing would be left.
    """
    number = text.strip()
    sign = number[:1] if number[:1] in ("+", "-") else ""
    size = parse_size(number[len(sign) :])
    if sign:
        size = current + size if sign == "+" else current - size
    if size <= 0:
        raise UsageError("the new size must be more than nothing")
    if size >= 1 << 63:
        raise UsageError(f"'{text}' is too large")
    return size


def format_size(size: float) -> str:
    """Return a size as ``qemu-img info`` prints it: ``512 B``, ``1.5 GiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}"

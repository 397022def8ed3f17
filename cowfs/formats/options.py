"""Creation options, ``-o KEY=VALUE``, as every format reads them."""

from collections.abc import Mapping, Sequence

from cowfs.errors import UsageError
from cowfs.units import parse_size


def refuse_unknown(format: str, options: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raise `UsageError` for the first option that a format does not have."""
    for name in options:
        if name not in known:
            raise UsageError(f"{format} has no option '{name}'; it takes {', '.join(known)}")


def parse_choice(options: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """Value of an option that takes one of some words; the first is the default."""
    value = options.get(name, choices[0])
    if value not in choices:
        raise UsageError(f"{name}={value} is not one of {', '.join(choices)}")
    return value


def parse_switch(options: Mapping[str, str], name: str) -> bool:
    """Value of an option that is on or off; off by default."""
    return parse_choice(options, name, ("off", "on")) == "on"


def parse_power(options: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """Log2 of an option that takes a size, a power of two from ``low`` to ``high``."""
    value = parse_size(options[name]) if name in options else default
    if not low <= value <= high or value & (value - 1):
        raise UsageError(f"{name}={options[name]} is not a power of two from {low} to {high}")
    return value.bit_length() - 1

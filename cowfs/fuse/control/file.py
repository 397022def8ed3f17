"""What a control file is."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from cowfs.jobs.changes import Changes


class Subject(Protocol):
    """What a control file tells about: the mount, or one image."""

    error: str
    changes: Changes


S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class ControlFile(Generic[S]):
    """One control file: how it is read, and what can be written to it.

    ``verbs`` names the commands it takes, with a line of help for each; ``command`` obeys one, given without
    its newline, or raises. ``changes`` is what `poll(2)` waits for.
    """

    name: str
    summary: str
    render: Callable[[S], Awaitable[str]]
    command: Callable[[S, str], Awaitable[None]] | None = None
    verbs: Mapping[str, str] = field(default_factory=dict)
    changes: Callable[[S], Changes] = lambda subject: subject.changes


def key_values(facts: Mapping[str, object]) -> str:
    """Render ``key: value`` lines; None is an empty value, a truth value ``on`` or ``off``."""
    return "".join(f"{key}: {_text(value)}\n" for key, value in facts.items())


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return one_line(str(value))


def one_line(text: str) -> str:
    """Return a text that cannot be taken for more than one line: control characters in octal, as in /proc/mounts."""
    return "".join(f"\\{ord(letter):03o}" if letter < " " or letter == "\x7f" else letter for letter in text)

"""Holding backing files against what the images on them remember, byte for byte where that is known."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import trio

from cowfs.block.identity import identify, stamp_of, whole_digest, whole_size
from cowfs.block.layer import Layer
from cowfs.errors import Unsupported
from cowfs.formats.chain import PLAIN, open_chain

#: told the bytes that are read, and how many there are
Progress = Callable[[int, int], None]


class Finding(NamedTuple):
    """What was found of one backing file.

    ``known`` says whether the image above remembered anything, ``difference`` in what way the file is not that, and
    ``compared`` whether every byte was compared.
    """

    image: str
    backing: str
    known: bool
    difference: str | None
    compared: bool


async def verify(name: str, format: str | None, progress: Progress, *, accept: bool) -> list[Finding]:
    """Compare every backing file of a chain, the active layer's first.

    ``accept`` has every image remember its backing file as it is now, all bytes of it.
    """
    layers = await open_chain(name, format, opening=replace(PLAIN, trusting=True))
    try:
        pairs = list(pairwise(layers))
        total = sum(whole_size(below) for _, below in pairs)
        findings: list[Finding] = []
        done = 0
        # from below, since to remember something changes the image that does
        for above, below in reversed(pairs):
            before = done

            def show(part: int, before: int = before) -> None:
                progress(before + part, total)

            findings.append(await _look(above, below, show, accept=accept))
            done += whole_size(below)
        return findings[::-1]
    finally:
        with trio.CancelScope(shield=True):
            for layer in layers:
                await layer.close()


async def _look(above: Layer, below: Layer, show: Callable[[int], None], *, accept: bool) -> Finding:
    now = (await identify(above, below))._replace(whole=await whole_digest(below, show))
    known = stamp_of(above)
    if accept and known != now:
        await above.set_writable(True)
        try:
            if not await above.image.set_stamp(now.pack()):
                raise Unsupported("has no room to remember its backing file", file=above.name)
        finally:
            with trio.CancelScope(shield=True):
                await above.set_writable(False)
    difference = known.difference(now) if known is not None else None
    return Finding(above.name, below.name, known is not None, difference, known is not None and any(known.whole))

"""Covering selections: few rows in which every combination of any few parameters' values occurs that may occur."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Row = dict[str, str]
#: values of some parameters, by the parameters' numbers
_Part = tuple[tuple[int, str], ...]


def covering(
    values: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool], strength: int = 2, seed: int = 1
) -> list[Row]:
    """Choose rows, one value for each parameter, that together have all combinations of ``strength`` parameters.

    Rows that are not ``allowed`` do not come up, nor do combinations that occur in no other rows. The same
    arguments choose the same rows.
    """
    rnd = random.Random(seed)
    rows = [row for row in product(*values.values()) if allowed(dict(zip(values, row, strict=True)))]
    places = list(combinations(range(len(values)), strength))
    holders: dict[_Part, list[tuple[str, ...]]] = {}
    for row in rows:
        for part in _parts(row, places):
            holders.setdefault(part, []).append(row)
    # in a fixed order, since sets have none
    left = dict.fromkeys(holders)
    chosen = []
    while left:
        # a row for the first combination that is missing: of some, the one that brings most others
        candidates = holders[next(iter(left))]
        sample = rnd.sample(candidates, min(len(candidates), 24))
        best = max(sample, key=lambda row: sum(part in left for part in _parts(row, places)))
        for part in _parts(best, places):
            left.pop(part, None)
        chosen.append(dict(zip(values, best, strict=True)))
    return chosen


def _parts(row: tuple[str, ...], places: Sequence[tuple[int, ...]]) -> list[_Part]:
    return [tuple((number, row[number]) for number in place) for place in places]

"""What comes out of the rounds of a comparison: medians, ratios within a round, goals, and the table of them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

#: whom cowfs is compared with, in the order of the table; the last two are bounds rather than peers
NAMES = ("cowfs", "qemu", "nbd", "floor", "raw")
PEERS = ("qemu", "nbd")
#: what a ratio is against: the fastest peer of the same round
BEST = "best"
#: the note of a figure that is one of cowfs in another case of the same round
OWN = "own"


class Result(NamedTuple):
    """One case, measured in rounds; each round has a figure for every name that was there."""

    case: str
    unit: str
    rounds: list[dict[str, float]]
    #: seconds and mebibytes are better when there are few of them
    lower_is_better: bool = False

    def median(self) -> dict[str, float]:
        """Return the median of each name."""
        return {name: statistics.median(found[name] for found in self.rounds) for name in self.rounds[0]}

    def ratio(self, other: str) -> float | None:
        """Return the median of the ratios within a round, above 1 where cowfs is better; None if there are none."""
        ratios = []
        for found in self.rounds:
            rivals = [found[name] for name in (PEERS if other == BEST else (other,)) if name in found]
            if "cowfs" not in found or not rivals:
                return None
            if self.lower_is_better:
                ratios.append(min(rivals) / found["cowfs"])
            else:
                ratios.append(found["cowfs"] / max(rivals))
        return statistics.median(ratios)

    def spread(self) -> float:
        """Return by how much of its median cowfs's own figure varies from round to round, from least to most."""
        own = [found["cowfs"] for found in self.rounds if "cowfs" in found]
        return (max(own) - min(own)) / statistics.median(own) if own else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        ratios = {other: self.ratio(other) for other in (BEST, *NAMES[1:])}
        return {
            **self._asdict(),
            "median": self.median(),
            "ratio": {other: ratio for other, ratio in ratios.items() if ratio is not None},
        }


class Goal(NamedTuple):
    """A ratio that is wanted; ``other`` is whom it is against, or with `OWN` a case of cowfs itself."""

    case: str
    other: str
    wanted: float
    versus: str = ""


def _pairs(cases: Iterable[str], best: float | None, floor: float | None) -> list[Goal]:
    goals = []
    for case in cases:
        goals += [Goal(case, BEST, best)] if best is not None else []
        goals += [Goal(case, "floor", floor)] if floor is not None else []
    return goals


def _both(*names: str) -> list[str]:
    return [f"{format}/{name}" for format in ("qcow2", "qed") for name in names]


GOALS = [
    *_pairs(_both("randread-4k-d32", "randwrite-4k-d32"), 1.5, 0.4),
    *_pairs(_both("randread-4k-d1", "randwrite-4k-d1"), 1.0, 0.8),
    *_pairs(_both("randread-64k-d8"), 1.0, 0.75),
    *_pairs(_both("read-1m-d1", "write-1m-d1"), 1.2, 0.8),
    *_pairs(_both("buffered-read"), 1.3, 1.0),
    *_pairs([f"allocate/{format}-{depth}" for format in ("qcow2", "qed") for depth in ("d1", "d32")], 2.0, None),
    Goal("chain32/randread-4k-d32", BEST, 3.0),
    Goal("chain32/randread-4k-d32", OWN, 0.9, "chain2/randread-4k-d32"),
    *_pairs(["jobs/stream", "jobs/commit"], 1.2, None),
    Goal("start/first-byte", BEST, 1.0),
]


def own_ratio(results: Mapping[str, Result], case: str, versus: str) -> float | None:
    """Return the median over the rounds of cowfs's figure in one case by that in another."""
    if case not in results or versus not in results:
        return None
    pairs = zip(results[case].rounds, results[versus].rounds, strict=True)
    return statistics.median(one["cowfs"] / other["cowfs"] for one, other in pairs)


def judge(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Say of each goal whose cases were measured what came out, and whether that reaches it."""
    named = {result.case: result for result in results}
    verdicts = []
    for goal in GOALS:
        if goal.other == OWN:
            got = own_ratio(named, goal.case, goal.versus)
        else:
            got = named[goal.case].ratio(goal.other) if goal.case in named else None
        if got is not None:
            verdicts.append({**goal._asdict(), "got": got, "reached": got >= goal.wanted})
    return verdicts


def header() -> str:
    """Return the first line of the table."""
    return f"{'case':30}{'unit':>6}" + "".join(f"{name:>9}" for name in NAMES) + f"{'/best':>8}{'/floor':>8}{'±':>6}"


def line(result: Result) -> str:
    """Return one line of the table: medians, ratios, and how much cowfs's figure varies."""
    median = result.median()
    cells = [number(median[name]) if name in median else "-" for name in NAMES]
    ratios = [ratio(result.ratio(other)) for other in (BEST, "floor")]
    text = f"{result.case:30}{result.unit:>6}" + "".join(f"{cell:>9}" for cell in cells)
    return text + "".join(f"{cell:>8}" for cell in ratios) + f"{result.spread():6.0%}"


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """Return one line of the goals."""
    against = {BEST: "the fastest peer", "floor": "the C floor", OWN: f"cowfs in {verdict['versus']}"}[verdict["other"]]
    word = "reached" if verdict["reached"] else "missed"
    return f"{word:8}{verdict['case']:30}{verdict['got']:6.2f} of {verdict['wanted']:.2f} against {against}"


def number(value: float) -> str:
    """Return a figure with three digits that mean something."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def ratio(value: float | None) -> str:
    """Return a ratio, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def restore(facts: Mapping[str, Any]) -> list[Result]:
    """Return the results that a JSON file has."""
    return [
        Result(found["case"], found["unit"], found["rounds"], found["lower_is_better"]) for found in facts["results"]
    ]

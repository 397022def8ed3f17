"""Many power cuts: run after run of what changes an image, each cut off at many moments, with many kinds of losses.

Runs differ by kind, format and seed; which ones there are depends on --seed alone. Kinds that begin with "held-" are on
a host that holds operations while everything else goes on. What was done is written to a state
file, so that the same command goes on where it was broken off. The run ends when enough states were tried; it fails if
any of them was wrong, and says how to see that again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from crashkinds import KINDS, PAIRS, Outcome, try_states

#: moments of one run that are tried besides its turning points, and states at each besides the one with nothing lost
MOMENTS, LOSSES = 40, 3
#: so many states that are wrong are enough to look at
MAX_FAILURES = 100
Run = tuple[str, str, int]


def runs(seed: int, kinds: list[str]) -> Iterator[Run]:
    """All runs of a seed, kinds and formats in turn."""
    pairs = [pair for pair in PAIRS if pair[0] in kinds]
    return ((kind, variant, seed + number) for number in count() for kind, variant in pairs)


def name_of(run: Run) -> str:
    """As the state file and --again have it."""
    return "/".join(map(str, run))


def attempt(run: Run, qemu: float) -> Outcome:
    """One run, in a process of its own."""
    return try_states(*run, moments=MOMENTS, losses=LOSSES, qemu=qemu)


def see_again(name: str) -> int:
    """Try one run, or one state of it, again: KIND/FORMAT/SEED or KIND/FORMAT/SEED/STATE."""
    kind, variant, seed, *state = name.split("/")
    only = state[0] if state else None
    outcome = try_states(kind, variant, int(seed), moments=MOMENTS, losses=LOSSES, only=only)
    print(f"{outcome.states} states")
    for state_name, text in outcome.failures:
        print(f"{kind}/{variant}/{seed}/{state_name}: {text}")
    return bool(outcome.failures)


class Record:
    """What was done: for each run states, states that QEMU saw, failures."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            known = json.loads(path.read_text())
            if known["seed"] != seed:
                raise SystemExit(f"scripts/crashtest: {path} is of --seed {known['seed']}; give another with --state")
            self.done = known["runs"]
        self.seed = seed

    @property
    def states(self) -> int:
        """All states that were tried."""
        return sum(entry["states"] for entry in self.done.values())

    @property
    def failures(self) -> int:
        """All states, and runs, that were wrong."""
        return sum(len(entry["failures"]) for entry in self.done.values())

    def add(self, run: Run, outcome: Outcome) -> None:
        """A run is done; what is on disk is always whole."""
        self.done[name_of(run)] = {
            "states": outcome.states,
            "qemu": outcome.with_qemu,
            "failures": outcome.failures,
        }
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps({"seed": self.seed, "runs": self.done}, indent=1))
        new.replace(self.path)

    def print_table(self) -> None:
        """States by kind and format, and every failure."""
        figures: dict[tuple[str, str], list[int]] = {}
        for name, entry in self.done.items():
            kind, variant, _ = name.split("/")
            row = figures.setdefault((kind, variant), [0, 0, 0, 0])
            for column, value in enumerate((1, entry["states"], entry["qemu"], len(entry["failures"]))):
                row[column] += value
        print(f"{'kind':16}{'format':16}{'runs':>8}{'states':>10}{'QEMU':>8}{'failures':>10}")
        for (kind, variant), row in sorted(figures.items()):
            print(f"{kind:16}{variant:16}{row[0]:8}{row[1]:10}{row[2]:8}{row[3]:10}")
        total = [sum(column) for column in zip(*figures.values(), strict=True)] or [0] * 4
        print(f"{'all':32}{total[0]:8}{total[1]:10}{total[2]:8}{total[3]:10}")
        for name, entry in self.done.items():
            for state, text in entry["failures"]:
                print(f"scripts/crashtest --again {name}/{state}   # {text}")


def try_many(record: Record, todo: Iterator[Run], wanted: int, jobs: int, qemu: float) -> None:
    """Try runs side by side until so many states are done."""
    waiting = (run for run in todo if name_of(run) not in record.done)
    with ProcessPoolExecutor(jobs) as pool:
        while record.states < wanted and record.failures < MAX_FAILURES:
            batch = {pool.submit(attempt, run, qemu): run for run in islice(waiting, 4 * jobs)}
            for future in as_completed(batch):
                outcome = future.result()
                record.add(batch[future], outcome)
                for state, text in outcome.failures:
                    print(f"{name_of(batch[future])}/{state}: {text}", flush=True)


def main() -> None:
    """Run, print a table, and fail if any state was wrong."""
    parser = argparse.ArgumentParser(prog="scripts/crashtest", description=__doc__)
    parser.add_argument("--states", type=int, default=20_000, help="states to try in all, those of the file included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind; may be given again")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--qemu", type=float, default=0.01, help="share of states that qemu-img looks at too")
    parser.add_argument("--state", type=Path, default=Path("crashtest.json"), help="file that says what was done")
    parser.add_argument("--again", metavar="RUN[/STATE]", help="try one run, or one state of it, once more")
    options = parser.parse_args()
    if options.again:
        raise SystemExit(see_again(options.again))
    record = Record(options.state, options.seed)
    before, start = record.states, time.monotonic()
    try:
        try_many(record, runs(options.seed, options.kind or list(KINDS)), options.states, options.jobs, options.qemu)
    except KeyboardInterrupt:
        print(f"broken off; the same command goes on with {options.state}")
    record.print_table()
    print(f"{record.states - before} states in {time.monotonic() - start:.0f} seconds")
    raise SystemExit(bool(record.failures))


if __name__ == "__main__":
    main()

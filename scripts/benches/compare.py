"""Everything beside every peer, in one run on the same images, all of them in memory (tmpfs).

Cases are called SUITE/CASE; within a case the peers take turns, and another begins in each round. What counts is the
median of the ratios within a round. The peers: cowfs; qemu, QEMU's FUSE export; nbd, qemu-nbd through nbdfuse. The
bounds: floor, a passthrough in C that serves a raw file of the same content; raw, that file itself.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from chart import draw
from exports import SETTINGS, lacking
from figures import NAMES, Result, header, judge, line, restore, verdict_line
from peers import machine
from suites import all_suites, scratch
from workloads import Context, Suite


def measure(suite: Suite, context: Context, rounds: int) -> list[Result]:
    """Run the rounds of one suite, and print a line for each case."""
    found: dict[str, Result] = {}
    suite.prepare(context)
    for number in range(rounds):
        for case, unit, values, lower_is_better in suite.round(context, number):
            if context.wants(case):
                found.setdefault(case, Result(case, unit, [], lower_is_better)).rounds.append(values)
    for result in found.values():
        print(line(result), flush=True)
    return list(found.values())


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is wanted; everything there is to say about it, for JSON."""
    names = options.peers.split(",")
    if packages := lacking(tuple(names)):
        sys.exit(f"bench: please install what Debian calls: {' '.join(packages)}")
    for name in names:
        print(f"{name:8}{SETTINGS[name]}")
    facts = machine()
    print(header(), flush=True)
    start = time.monotonic()
    results: list[Result] = []
    for suite in all_suites():
        with scratch(options.folder) as folder:
            only = options.only.split(",") if options.only else []
            context = Context(folder, options.size, options.seconds, names, only)
            if any(map(context.wants, suite.cases())):
                results += measure(suite, context, options.rounds)
    return {
        "machine": {**facts, "load-at-end": machine()["load"]},
        "settings": {name: SETTINGS[name] for name in names},
        "size": options.size,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "taken": round(time.monotonic() - start),
        "results": [result.as_dict() for result in results],
        "goals": judge(results),
    }


def caption(facts: dict[str, Any]) -> str:
    """Say in one line what a run was taken on."""
    where = facts["machine"]
    return (
        f"Median of {facts['rounds']} rounds; {where['cores']} cores, Linux {where['kernel'].split('-')[0]}, "
        f"Python {where['python']}, QEMU {where['qemu']}, images in memory"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round of small images: to see that it works")
    parser.add_argument("--rounds", type=int, help="default 5; with --quick 1")
    parser.add_argument("--size", type=int, help="MiB of the disks; default 512, with --quick 128")
    parser.add_argument("--seconds", type=float, help="of a run that is bounded by time; default 2, with --quick 0.3")
    parser.add_argument("--only", default="", metavar="CASE,…", help="suites or cases; --list tells which there are")
    parser.add_argument("--peers", default=",".join(NAMES), metavar="NAME,…", help="default: all")
    parser.add_argument("--folder", default="/dev/shm", help="where the images lie")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="run nothing: show an earlier run")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--svg", type=Path, help="file for a chart")
    options = parser.parse_args()
    usual = (1, 128, 0.3) if options.quick else (5, 512, 2.0)
    for name, value in zip(("rounds", "size", "seconds"), usual, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    known = {name for suite in all_suites() for name in (*suite.names, *suite.cases())}
    for word in filter(None, options.only.split(",")):
        if word not in known:
            parser.error(f"--only: no suite or case '{word}'; --list tells which there are")
    for word in options.peers.split(","):
        if word not in NAMES:
            parser.error(f"--peers: no '{word}' among {', '.join(NAMES)}")
    return options


def main() -> None:
    """Run, print the table and the goals, and write JSON and a chart where asked."""
    options = arguments()
    if options.list:
        print("\n".join(case for suite in all_suites() for case in suite.cases()))
        return
    if options.source:
        facts = json.loads(options.source.read_text())
        print(header())
        for result in restore(facts):
            print(line(result))
        facts["goals"] = judge(restore(facts))
    else:
        facts = compare(options)
    print(caption(facts))
    for verdict in facts["goals"]:
        print(verdict_line(verdict))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    if options.svg:
        options.svg.write_text(draw(restore(facts), caption(facts)))


if __name__ == "__main__":
    main()

"""The power goes at any moment: of guests' work, streaming, commit, snapshots, resizing, rebase and repair.

Whatever the moment, and whatever was lost of what no flush had made durable: every image is structurally sound,
what a flush acknowledged is there, and everything else is, sector by sector, something the guest has written
there or what was there before. Each kind of run is tried on a quick host, and on one that holds any operation while
everything else goes on. ``scripts/crashtest`` tries many more states of many more runs.
"""

from typing import Literal

import pytest
from crashkinds import HELD, PAIRS, try_states

from cowfs.block.metacache import Table, _Snapshot

#: moments of each run besides its turning points, and states besides the one with nothing lost at each
MOMENTS, LOSSES = 4, 2
#: the same of runs on a slow host
HELD_MOMENTS, HELD_LOSSES = 2, 1
#: share of the states that QEMU looks at too
QEMU = 0.01


@pytest.mark.needs("qemu-img", "qemu-io")
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_power_cuts(kind: str, variant: str) -> None:
    moments, losses = (HELD_MOMENTS, HELD_LOSSES) if kind.startswith(HELD) else (MOMENTS, LOSSES)
    outcome = try_states(kind, variant, 1, moments=moments, losses=losses, qemu=QEMU)
    assert outcome.failures == []
    assert outcome.states > moments


def test_a_slow_host_shows_tables_that_are_dropped_while_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holding operations is for: a cache that takes for clean what is still on its way is found out."""
    take = _Snapshot.take

    def forgetful(snapshot: _Snapshot, table: Table, *order: Literal["little", "big"]) -> None:
        take(snapshot, table, *order)
        table.being_written = False
        snapshot.tables.clear()

    monkeypatch.setattr(_Snapshot, "take", forgetful)
    runs = [("held-guest", variant, seed) for variant in ("qcow2", "qcow2-512") for seed in range(1, 6)]
    assert sum(bool(try_states(*run, moments=4, losses=0).failures) for run in runs) > 1

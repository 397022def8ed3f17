"""The power goes at any moment: of guests' work, streaming, commit, snapshots, resizing, rebase and repair.

Whatever the moment, and whatever was lost of what no flush had made durable: every image is structurally sound,
what a flush acknowledged is there, and everything else is, sector by sector, something the guest has written
there or what was there before. ``scripts/crashtest`` tries many more states of many more runs.
"""

import pytest
from crashkinds import PAIRS, try_states

#: moments of each run besides its turning points, and states besides the one with nothing lost at each
MOMENTS, LOSSES = 4, 2
#: share of the states that QEMU looks at too
QEMU = 0.01


@pytest.mark.needs("qemu-img", "qemu-io")
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_power_cuts(kind: str, variant: str) -> None:
    outcome = try_states(kind, variant, 1, moments=MOMENTS, losses=LOSSES, qemu=QEMU)
    assert outcome.failures == []
    assert outcome.states > MOMENTS

"""Jobs whose steps do not depend on the time."""

import pytest

from cowfs.jobs import pacing


def steady_steps(patches: pytest.MonkeyPatch, size: int) -> None:
    """Make steps of so many bytes, which take turns with requests of guests."""
    for name, value in (("LEAST", size), ("SMALLEST", size), ("MOST", size), ("MIN_RATE", 1 << 60), ("SEARCHING", 1)):
        patches.setattr(pacing, name, value)

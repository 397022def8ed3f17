"""Internal snapshots as ``qemu-img`` shows them, as a table and in JSON."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from cowfs.block.snapshots import InternalSnapshot
from cowfs.units import format_size

_SECOND = 1_000_000_000


def table(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with a title, in local time, from what `facts` gives; none if there are no snapshots."""
    if not facts:
        return []
    title = f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    return ["Snapshot list:", title, *map(_row, facts)]


def _row(fact: Mapping[str, Any]) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fact["date-sec"]))
    seconds, milliseconds = fact["vm-clock-sec"], fact["vm-clock-nsec"] // 1_000_000
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
    size = format_size(fact["vm-state-size"])
    return f"{fact['id']:<9} {fact['name']:<16} {size:>8}{date:>20}{clock:>13}{fact.get('icount', ''):>11}"


def facts(snapshots: Sequence[InternalSnapshot]) -> list[dict[str, Any]]:
    """Return what ``qemu-img info --output=json`` says of each."""
    found = []
    for snapshot in snapshots:
        fact: dict[str, Any] = {} if snapshot.icount is None else {"icount": snapshot.icount}
        fact["vm-clock-nsec"] = snapshot.vm_clock % _SECOND
        fact["name"] = snapshot.name
        fact["date-sec"] = snapshot.date
        fact["date-nsec"] = snapshot.date_nanoseconds
        fact["vm-clock-sec"] = snapshot.vm_clock // _SECOND
        fact["id"] = snapshot.id
        fact["vm-state-size"] = snapshot.vm_state_size
        found.append(fact)
    return found

"""How large a new QED image would be: header, tables and data, cluster for cluster as a conversion makes them."""

from collections.abc import Mapping

from cowfs.block.alignment import align_up
from cowfs.block.disk import Disk
from cowfs.formats.measuring import Measured, data_runs, disk_size
from cowfs.formats.qed.create import plan_header
from cowfs.formats.qed.layout import Header


async def measure(size: int, source: Disk | None, options: Mapping[str, str]) -> Measured:
    """Measure an image of ``size`` bytes, or one with the content of ``source``. Raises `UsageError` for options.

    Of an overlay nobody knows how much its backing file would share with it: it counts as full.
    """
    has_backing = "backing_file" in options
    chosen = {name: value for name, value in options.items() if name not in ("backing_file", "backing_fmt")}
    header = plan_header(size if source is None else disk_size(source), None, chosen)
    empty = header.header_bytes + header.table_bytes
    full = empty + _table_bytes(header, 0, header.size)[0] + align_up(header.size, header.cluster_size)
    if source is None:
        return Measured(empty, full)
    if has_backing:
        return Measured(full, full)
    required, counted = empty, 0
    async for start, end in data_runs(source, header.cluster_size):
        tables, counted = _table_bytes(header, max(start, counted), end)
        required += tables + end - start
    return Measured(required, full)


def _table_bytes(header: Header, start: int, end: int) -> tuple[int, int]:
    """Bytes of the L2 tables for a range of the disk, and where the range of the last one ends."""
    reach = header.table_reach
    count = max(0, -(-end // reach) - start // reach)
    return count * header.table_bytes, align_up(end, reach)

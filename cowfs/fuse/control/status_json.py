"""``status.json``: everything about one image, for programs."""

import json
from typing import Any

from cowfs.fuse.control import stats
from cowfs.fuse.control.file import ControlFile
from cowfs.fuse.images import Served
from cowfs.jobs.control import KINDS, progress


def facts(served: Served) -> dict[str, Any]:
    """Return the same as ``status``, with the chain, the jobs and the counters; sizes in bytes."""
    disk, jobs = served.disk, served.jobs.jobs
    # the last started first
    verbs = [*reversed(jobs), *(verb for verb in KINDS if verb not in jobs)]
    return {
        "name": served.name,
        "file": served.file,
        "format": disk.layers[0].format,
        "size": disk.size,
        "cluster-size": disk.cluster_size,
        "depth": len(disk.layers),
        "read-only": disk.read_only,
        "copy-on-read": disk.copy_on_read,
        "open-files": served.open_files,
        "error": served.error,
        "chain": [
            {
                "index": len(disk.layers) - 1 - depth,
                "format": layer.format,
                "size": layer.size,
                "allocated": layer.storage.allocated,
                "file": layer.name,
            }
            for depth, layer in enumerate(disk.layers)
        ],
        "jobs": {verb: progress(jobs.get(verb)) for verb in verbs},
        "stats": stats.counters(served),
    }


async def render(served: Served) -> str:
    """Return the facts as one JSON object."""
    return json.dumps(facts(served), indent=4) + "\n"


FILE = ControlFile("status.json", "the same, the chain, the jobs and the counters; for programs", render)

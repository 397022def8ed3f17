"""``stream``: the job that fills the active layer from its backing."""

from cowfs.fuse.control.job import job_file

FILE = job_file("stream", "the job that copies what the layers below hold into the active layer")

"""``commit``: the job that merges the active layer into its backing."""

from cowfs.fuse.control.job import job_file

FILE = job_file("commit", "the job that copies what the active layer holds into its backing file")

"""Starting the workers of a run, or of a conversion (``spread``). Ray is imported here and nowhere else."""

from mbdist_launch.batch import BatchJob
from mbdist_launch.job import Job, JobServer
from mbdist_launch.workers import launch_local, launch_on_cluster

__all__ = ["BatchJob", "Job", "JobServer", "launch_local", "launch_on_cluster"]

"""Starting the workers of a run. Ray is imported here and nowhere else."""

from mbdist_launch.local import launch_local

__all__ = ["launch_local"]

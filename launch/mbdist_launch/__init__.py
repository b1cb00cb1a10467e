"""Starting the workers of a run or of a conversion. Ray is imported here and nowhere else."""

from mbdist_launch.local import launch_local
from mbdist_launch.spread import spread_over

__all__ = ["launch_local", "spread_over"]

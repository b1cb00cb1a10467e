"""Ray on this machine, quiet: for as long as a run or a conversion takes."""

from __future__ import annotations

import os

# Ray sets these up on import: no phoning home, no metrics exporter for a run that ends in minutes, and workers that do
# not give way to everything else on the machine (by default they are at niceness 15).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def start_ray_here(num_cpus: int) -> None:
    """A Ray instance of its own; the caller shuts it down."""
    import ray

    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **QUIET)

from __future__ import annotations

from mbdist.cli.options import Overrides, RunFile


def train(run: RunFile, overrides: Overrides = None) -> None:
    """Run a config without Ray: in this process, or as one of torchrun's.

    Example: `torchrun --nproc-per-node 2 -m mbdist.cli.main train configs/quickstart.yaml`
    """
    import contextlib
    import os
    import time
    from pathlib import Path

    from mbdist.cli.launch import print_summary
    from mbdist.config import load_config
    from mbdist.train.finish import finish_run
    from mbdist.train.run_folder import noting_how_it_ends, open_run_folder
    from mbdist.train.watch import RunWatcher

    started = time.time()
    config = load_config(run, overrides or [])
    started_by_launcher = "RANK" in os.environ  # later every worker has it
    first = int(os.environ.get("RANK", 0)) == 0
    if not started_by_launcher and config.cluster.fewest_workers != 1:
        from mbdist.errors import ConfigError

        torchrun = f"torchrun --nproc-per-node {config.cluster.most_workers} -m mbdist.cli.main train {run}"
        raise ConfigError(
            f"cluster.workers = {config.cluster.workers}, but this is one process: use `mbdist launch local {run}`, "
            f"`{torchrun}`, or cluster.workers=1"
        )
    if first:
        config = open_run_folder(config)
    else:
        config = config.model_copy(update={"run_dir": str(Path(config.run_dir).resolve())})
    from mbdist.train.ending import end_process
    from mbdist.train.environment import leave_group, pin_accelerator

    pin_accelerator(config)
    from mbdist.train.worker import run_worker

    with contextlib.ExitStack() as around:
        if first:
            around.enter_context(noting_how_it_ends(config))
            around.enter_context(RunWatcher(Path(config.run_dir) / "metrics.jsonl"))
        run_worker(config)
    leave_group()
    if first:
        with noting_how_it_ends(config):
            print_summary(finish_run(config, started), config.run_dir)
    if started_by_launcher:
        end_process()

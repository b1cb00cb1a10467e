"""A run on this machine: Ray Train starts, watches and ends the workers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mbdist.config import RunConfig
from mbdist.errors import RunError, UserError
from mbdist.train.finish import finish_run
from mbdist.train.run_folder import open_run_folder
from mbdist.train.watch import RunWatcher
from mbdist_launch.ray_here import start_ray_here


def launch_local(config: RunConfig) -> dict:
    """Run ``config`` on this machine and return its summary. Raises UserError for a mistake of the user's,
    RunError (with the workers' own message) for everything else that ends a run."""
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    started = time.time()
    config = open_run_folder(config)
    workers = config.cluster.workers
    cores = len(os.sched_getaffinity(0))
    cpus_per_worker = config.cluster.cpus_per_worker or max(1, cores // workers)
    start_ray_here(num_cpus=max(cores, workers * cpus_per_worker))
    try:
        use_gpus = _use_gpus(config, int(ray.cluster_resources().get("GPU", 0)))
        device = config.cluster.model_copy(update={"device": "cuda" if use_gpus else "cpu"})
        trainer = _trainer(config.model_copy(update={"cluster": device}), cpus_per_worker, use_gpus)
        with RunWatcher(Path(config.run_dir) / "metrics.jsonl"):
            trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error, config) from error
    finally:
        ray.shutdown()
    return finish_run(config, started)


def _use_gpus(config: RunConfig, gpus: int) -> bool:
    """GPUs where there is one for every worker; a run that asks for them and cannot have them is refused."""
    workers, device = config.cluster.workers, config.cluster.device
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus >= workers:
        return True
    fix = f"this machine has {gpus} GPU(s) for cluster.workers = {workers}: set cluster.workers={max(1, gpus)}"
    if device == "cuda":
        raise UserError(f"{fix}, or cluster.device=cpu")
    print(f"{fix} to use them; running on the CPU")
    return False


def _trainer(config: RunConfig, cpus_per_worker: int, use_gpu: bool):
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _worker,
        train_loop_config={"run": config.model_dump(mode="json"), "cwd": os.getcwd(), "path": sys.path},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=config.comm.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(name="train", storage_path=str(Path(config.run_dir) / "ray")),
    )


def _worker(settings: dict) -> None:
    """What Ray runs in every worker process. Its output goes to ``logs/rank_N.log`` of the run."""
    os.chdir(settings["cwd"])  # relative paths of a config mean the same as where it was launched
    sys.path[:] = settings["path"]
    from mbdist.config import parse_config
    from mbdist.train.environment import pin_accelerator

    config = parse_config(settings["run"])
    pin_accelerator(config)
    from mbdist.train.trainer import run_worker

    log = Path(config.run_dir) / "logs" / f"rank_{os.environ['RANK']}.log"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        run_worker(config)


def _cause(error: Exception, config: RunConfig) -> Exception:
    """The worker's own exception where it is the user's to mend, else one that says where to look."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, UserError):
            return UserError(str(cause))
    first = next(iter(failures.values()), error)
    return RunError(f"the run failed; the workers' output is in {config.run_dir}/logs\n{first}")

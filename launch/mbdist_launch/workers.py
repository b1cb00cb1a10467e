"""A run on Ray: on this machine, or on a cluster. Ray Train starts, watches and replaces the workers."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mbdist.checkpoint import latest_checkpoint
from mbdist.config import RunConfig
from mbdist.errors import Interrupted, RunError, UserError
from mbdist.train.ending import end_process
from mbdist.train.finish import finish_run
from mbdist.train.run_folder import note_end, noting_how_it_ends, open_run_folder
from mbdist.train.stop_signals import on_stop_signals, stop_file
from mbdist.train.watch import RunWatcher
from mbdist_launch.ray_here import QUIET, start_ray_here

_NODES_TIMEOUT_S = 300
_NOBODY_TIMEOUT_S = 20  # without a worker, after which nobody will save


def launch_local(config: RunConfig) -> dict:
    """Run ``config`` on this machine and return its summary. Raises UserError for a mistake of the user's,
    RunError (with the workers' own message) for everything else that ends a run, Interrupted where it was told to
    stop and has saved."""
    cores = len(os.sched_getaffinity(0))
    cpus = config.cluster.cpus_per_worker or max(1, cores // config.cluster.most_workers)
    here = {"cwd": os.getcwd(), "path": sys.path}  # relative paths of a config mean the same to the workers
    return _run(config, cpus, here, lambda: start_ray_here(num_cpus=max(cores, config.cluster.most_workers * cpus)))


def launch_on_cluster(config: RunConfig, nodes: int = 1) -> dict:
    """The same on the Ray cluster that this process is a part of, as a submitted job's entry point is, or that
    RAY_ADDRESS names, once it has so many nodes. ``run_dir`` must be on storage that all nodes share."""
    import ray

    if not Path(config.run_dir).is_absolute():
        raise UserError(
            f"run_dir = {config.run_dir}: on a cluster it must be an absolute path, on storage that all nodes share"
        )

    def connect() -> None:
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **QUIET)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster here (RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}): {error}") from error
        deadline = time.monotonic() + _NODES_TIMEOUT_S
        while len(alive := [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]]) < nodes:
            if time.monotonic() > deadline:
                raise RunError(f"after {_NODES_TIMEOUT_S} s the cluster has {len(alive)} of {nodes} nodes: {alive}")
            time.sleep(1)

    return _run(config, config.cluster.cpus_per_worker or 1, {}, connect)


def _run(config: RunConfig, cpus_per_worker: int, place: dict, connect: Callable[[], None]) -> dict:
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    started = time.time()
    config = open_run_folder(config)
    _ended(config).unlink(missing_ok=True)
    with noting_how_it_ends(config):
        connect()
        try:
            use_gpus = _use_gpus(config, int(ray.cluster_resources().get("GPU", 0)))
            device = config.cluster.model_copy(
                update={"device": "cuda" if use_gpus else "cpu", "cpus_per_worker": cpus_per_worker}
            )
            trainer = _trainer(config.model_copy(update={"cluster": device}), place, use_gpus)
            on_stop_signals(lambda: _stop(config))  # after Ray, which has a handler of its own
            with RunWatcher(Path(config.run_dir) / "metrics.jsonl"):
                trainer.fit()
            if (ended := _how_it_ended(config)) is not None:
                raise ended
        except TrainingFailedError as error:
            raise _cause(error, config) from error
        finally:
            ray.shutdown()
        return finish_run(config, started)


def _stop(config: RunConfig) -> None:
    """Tell the workers, who save and end; where Ray waits for room and there are none, end here."""
    stop_file(config.run_dir).touch()
    threading.Thread(target=_leave_if_nobody_works, args=(config,), daemon=True).start()


def _has_workers() -> bool:
    """Whether this run has a place on the cluster; others may have one beside it. A group's id ends with its job's."""
    import ray
    from ray.util import placement_group_table

    own = ray.get_runtime_context().get_job_id()
    groups = placement_group_table().values()
    return any(group["state"] == "CREATED" and group["placement_group_id"].endswith(own) for group in groups)


def _leave_if_nobody_works(config: RunConfig) -> None:
    idle_since = time.monotonic()
    while time.monotonic() < idle_since + _NOBODY_TIMEOUT_S:
        if _has_workers():
            idle_since = time.monotonic()
        time.sleep(1)
    saved = latest_checkpoint(Path(config.run_dir) / "checkpoints")
    stopped = Interrupted(int(saved.name.removeprefix("step_")) if saved else 0)
    note_end(config, stopped)
    print(stopped, file=sys.stderr)
    end_process(os.EX_TEMPFAIL)


def _use_gpus(config: RunConfig, gpus: int) -> bool:
    """GPUs where there is one for every worker; a run that asks for them and cannot have them is refused."""
    workers, device = config.cluster.fewest_workers, config.cluster.device
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus >= workers:
        return True
    fix = f"Ray has {gpus} GPU(s) for cluster.workers = {config.cluster.workers}: set cluster.workers={max(1, gpus)}"
    if device == "cuda":
        raise UserError(f"{fix}, or cluster.device=cpu")
    print(f"{fix} to use them; running on the CPU")
    return False


def _trainer(config: RunConfig, place: dict, use_gpu: bool):
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from mbdist_launch.lost_workers import LostWorkers

    sizes = (config.cluster.fewest_workers, config.cluster.most_workers)
    return TorchTrainer(
        _worker,
        train_loop_config={"run": config.model_dump(mode="json"), **place},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=config.comm.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=sizes if sizes[0] < sizes[1] else sizes[0],
            elastic_resize_monitor_interval_s=config.cluster.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": config.cluster.cpus_per_worker,
                **({"GPU": 1} if use_gpu else {}),
                **config.cluster.resources,
            },
            placement_strategy=config.cluster.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{time.time_ns()}",  # Ray's own notes on an earlier run of this folder are not this run's
            storage_path=str(Path(config.run_dir) / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_restarts),
            callbacks=[LostWorkers(Path(config.run_dir) / "metrics.jsonl", _ended(config))],
        ),
    )


def _worker(settings: dict) -> None:
    """What Ray runs in every worker process. Its output goes to ``logs/rank_N.log`` of the run."""
    if "cwd" in settings:
        os.chdir(settings["cwd"])
        sys.path[:] = settings["path"]
    from mbdist.config import parse_config
    from mbdist.train.environment import pin_accelerator

    config = parse_config(settings["run"])
    pin_accelerator(config)
    from mbdist.train.worker import run_worker

    if not Path(config.run_dir).is_dir():
        raise RunError(f"{socket.gethostname()} has no run_dir {config.run_dir}: it must be on storage of all nodes")
    if _ended(config).exists():
        return  # a restart cannot mend what ended the run
    log = Path(config.run_dir) / "logs" / f"rank_{os.environ['RANK']}.log"
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            import ray.train

            # Older versions of Ray do not say.
            run_worker(config, _a_node_is_leaving if hasattr(ray.train, "get_preemption_info") else None)
        except Interrupted as stopped:
            _ended(config).write_text(json.dumps({"step": stopped.step}))
        except UserError as error:
            _ended(config).write_text(json.dumps({"error": str(error)}))
            raise


def _a_node_is_leaving() -> bool:
    """Whether Ray was told that a worker's node is about to go. All workers ask together, and hear the same."""
    from ray.train import get_preemption_info

    return get_preemption_info() is not None


def _ended(config: RunConfig) -> Path:
    """Where workers say why the run ends here, though Ray would start them again."""
    return Path(config.run_dir) / "logs" / "ended.json"


def _how_it_ended(config: RunConfig) -> Exception | None:
    if not _ended(config).exists():
        return None
    why = json.loads(_ended(config).read_text())
    return Interrupted(why["step"]) if "step" in why else UserError(why["error"])


def _cause(error: Exception, config: RunConfig) -> Exception:
    """The worker's own exception where it is the user's to mend, else one that says where to look."""
    failures = getattr(error, "worker_failures", {})
    if (ended := _how_it_ended(config)) is not None:
        return ended
    first = next(iter(failures.values()), error)
    return RunError(f"the run failed; the workers' output is in {config.run_dir}/logs\n{first}")

"""The section ``cluster``: workers, and where a launcher puts them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag

from mbdist.config.section import Section

LAUNCHERS_OWN = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_STOP_WAIT_TIME_S",
    "RAY_TRAIN_METRICS_ENABLED",
    "RAY_USAGE_STATS_ENABLED",
}


class WorkerRange(Section):
    min: PositiveInt
    """The run waits until so many can start."""
    max: PositiveInt
    """More are not used."""


def _kind_of_workers(given: object) -> str:
    return "WorkerRange" if isinstance(given, dict | WorkerRange) else "number"


class ClusterConfig(Section):
    workers: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[WorkerRange, Tag("WorkerRange")],
        Discriminator(_kind_of_workers),
    ] = 1
    """Data-parallel workers. One GPU each where there are GPUs. `{min: 2, max: 8}`, where Ray starts them: as many as
    there is room for, fewer after nodes were lost, more when they are back."""
    resize_every_s: Annotated[float, Field(gt=0)] = 60
    """With a range of workers: how often to see whether there is room for more. To grow costs the steps since the last
    checkpoint."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage of the float state; stage 3 partitions the planes too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs where the machine has them."""
    placement: Literal["pack", "spread"] = "pack"
    """On a Ray cluster: workers on few nodes, or on many."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    """On a Ray cluster: custom resources that a worker takes, besides its cores and its GPU."""
    environment: list[str] = []
    """Names of variables that a submitted job and its workers get from the environment that submits it."""
    max_restarts: Annotated[int, Field(ge=0)] = 20
    """How often Ray starts the workers again, from the last checkpoint, after one of them was lost."""
    cpus_per_worker: PositiveInt | None = None
    """Cores a worker may use. Default: on one machine its cores shared evenly, on a cluster one."""

    check_memory: bool = True
    """Stop before the work starts where `mbdist plan` says that the workers need more memory than there is. false: say
    so and go on."""

    @property
    def fewest_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

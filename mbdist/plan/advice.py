"""What would make a run fit: settings, the cheapest first, each tried on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from mbdist.config.schema import RunConfig
from mbdist.plan.memory import MemoryPlan, plan_memory
from mbdist.plan.model import PlannedModel


@dataclass(frozen=True)
class Advice:
    """A change, together with those before it in a list of advice."""

    setting: str  # as on the command line
    costs: str
    memory: MemoryPlan


def advice(
    planned: PlannedModel,
    before: MemoryPlan,  # of ``planned`` as it is
    workers: int,
    dtype: torch.dtype,
    device: str,
    fits: Callable[[int], bool],
) -> list[Advice]:
    """Changes on top of each other until the run fits; those that save less than 1 % are left out. All of them, where
    the run does not fit even so."""
    found: list[Advice] = []
    config = planned.config
    for setting, value, costs in _levers(planned.config, workers, device):
        if fits(before.total):
            break
        changed = config.changed({setting: value})
        memory = plan_memory(replace(planned, config=changed), workers, dtype, device)
        if memory.total < 0.99 * before.total:
            shown = str(value).lower() if isinstance(value, bool) else value
            found.append(Advice(f"{setting}={shown}", costs, memory))
            config, before = changed, memory
    return found


def _levers(config: RunConfig, workers: int, device: str) -> Iterator[tuple[str, object, str]]:
    """(setting, value, what it costs), cheapest first."""
    yield "train.activation_checkpointing", True, "a third more compute"
    smaller = [m for m in range(config.train.micro_batch - 1, 0, -1) if config.train.micro_batch % m == 0]
    for micro_batch in smaller:
        yield "train.micro_batch", micro_batch, "smaller products"
    if workers > 1 and config.cluster.zero_stage < 3:
        yield "cluster.zero_stage", 3, "planes are gathered in every pass"
    if config.cluster.zero_stage == 3 and config.comm.resident_planes != "none":
        yield "comm.resident_planes", "none", "all planes are gathered in every pass"
    if config.boolean.signal == "curvature" and config.boolean.accumulator != "int4":
        yield "boolean.accumulator", "int4", "coarser accumulators"
    if device == "cuda":
        yield "train.offload_activations", True, "they cross to host memory and back"
        yield "boolean.offload_accumulators", True, "they cross to host memory and back"

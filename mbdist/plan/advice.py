"""What would make a run fit: settings, the cheapest first, each tried on paper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mbdist.config import RunConfig, with_changes
from mbdist.errors import ConfigError
from mbdist.plan.memory import MemoryPlan, plan_memory
from mbdist.plan.model import PlannedModel

_FEW_TOKENS = 128  # whose logits are there at a time


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
    fits: Callable[[MemoryPlan], bool],
) -> list[Advice]:
    """Changes on top of each other until the run fits; those that save less than 1 %, or that the config does not
    admit, are left out. All of them, where the run does not fit even so."""
    found: list[Advice] = []
    for changes, costs in _levers(planned.config, workers, device):
        if fits(before):
            break
        with contextlib.suppress(ConfigError):  # other settings forbid it
            changed = planned.with_config(with_changes(planned.config, changes))
            memory = plan_memory(changed, workers, dtype, device)
            if memory.total < 0.99 * before.total:
                found.append(Advice(_as_overrides(changes), costs, memory))
                planned, before = changed, memory
    return found


def _as_overrides(changes: dict[str, object]) -> str:
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _levers(config: RunConfig, workers: int, device: str) -> Iterator[tuple[dict[str, object], str]]:
    """(changes, what they cost), cheapest first."""
    yield {"train.activation_checkpointing": True}, "a third more compute"
    smaller = [m for m in range(config.train.micro_batch - 1, 0, -1) if config.train.micro_batch % m == 0]
    for micro_batch in smaller:
        yield {"train.micro_batch": micro_batch}, "smaller products"
    if (config.loss.chunk_tokens or _FEW_TOKENS + 1) > _FEW_TOKENS:
        yield {"loss.chunk_tokens": _FEW_TOKENS}, "more and smaller products with the head"
    if config.loss.teacher == "float":
        if workers > 1 and config.loss.teacher_placement == "resident":
            yield {"loss.teacher_placement": "sharded"}, "the teacher is gathered in every pass"
        yield {"loss.teacher": "cached"}, "its most likely tokens alone, written first by mbdist teacher cache"
    if workers > 1 and config.cluster.zero_stage < 3:
        yield {"cluster.zero_stage": 3}, "planes are gathered in every step"
    if config.comm.keep_gathered_gb and workers > 1:
        yield {"comm.keep_gathered_gb": 0}, "blocks are gathered in forward and in backward passes"
    if config.comm.resident_floats != "none":
        yield {"comm.resident_floats": "none"}, "embeddings and head are gathered in every pass"
    if config.comm.resident_planes != "none":
        yield {"comm.resident_planes": "none"}, "all planes are gathered in every step"
    if config.boolean.signal == "evidence":
        signal = {"boolean.signal": "curvature", "boolean.step_size": 0.05}
        yield {"boolean.accumulator": "int4", **signal}, "coarser accumulators, which the evidence signal cannot use"
    else:
        yield {"boolean.accumulator": "int4"}, "coarser accumulators"
    if device == "cuda":
        yield {"train.offload_activations": True}, "they cross to host memory and back"
        yield {"boolean.offload_accumulators": True}, "they cross to host memory and back"

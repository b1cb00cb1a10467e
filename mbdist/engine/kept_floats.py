"""What a rank keeps of the trained floats and of AdamW's moments at any ZeRO stage: checkpoints hold these parts.

Stage 0 keeps all of both. Stages 1 and 2 keep all floats and, of the moments, a part of a flat group of parameters;
stage 3 keeps a part of every parameter, padded at its end. No rank asks another here: a gather a tensor would hold up
the step in which a checkpoint is saved.
"""

from __future__ import annotations

from typing import NamedTuple

import deepspeed
import torch
from deepspeed.utils import safe_get_local_optimizer_state
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class KeptPart(NamedTuple):
    """A range of a parameter, and its moments."""

    first: int  # element of the flat whole parameter
    value: torch.Tensor  # (count,)
    moments: dict[str, torch.Tensor]  # (count,) each, those that training writes to; none before the first step


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps that were taken; 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def kept_parts(engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, KeptPart]:
    """This rank's parts of the parameters that train, by name; parameters of which it keeps nothing are left out."""
    stage = engine.zero_optimization_stage()
    keys = MOMENTS if optimizer_steps(optimizer) else ()
    if keys and stage in (1, 2):
        # By itself DeepSpeed ties parameters to their moments once, within the first step, and only the first group's.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    find = {0: _whole, 1: _of_flat_group, 2: _of_flat_group, 3: _of_parameter}[stage]
    trained = ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)
    parts = {name: find(optimizer, parameter, keys, rank) for name, parameter in trained}
    return {name: part for name, part in parts.items() if part.value.numel()}


def _whole(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, keys: tuple[str, ...], rank: int) -> KeptPart:
    return KeptPart(0, parameter.detach().view(-1), {key: optimizer.state[parameter][key].view(-1) for key in keys})


def _of_flat_group(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, keys: tuple[str, ...], rank: int
) -> KeptPart:
    part = parameter._hp_mapping
    if part is None:
        return KeptPart(0, parameter.detach().view(-1)[:0], {})
    first, count = part.lp_fragment_address.start, part.lp_fragment_address.numel
    moments = {key: part.get_hp_fragment(key) for key in keys}
    return KeptPart(first, parameter.detach().view(-1)[first : first + count], moments)


def _of_parameter(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, keys: tuple[str, ...], rank: int
) -> KeptPart:
    padded = parameter.ds_tensor.numel()
    first = padded * rank
    count = max(0, min(padded, parameter.ds_numel - first))
    moments = {key: safe_get_local_optimizer_state(parameter, key)[:count] for key in keys}
    return KeptPart(first, parameter.ds_tensor.detach().view(-1)[:count], moments)


def make_moments(engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Give an optimizer that has not stepped yet ``steps`` and moments of zeros, as ZeRO would keep them."""
    match engine.zero_optimization_stage():
        case 0:
            kept = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        case 3:
            kept = engine.optimizer.fp32_partitioned_groups_flat
        case _:
            kept = engine.optimizer.single_partition_of_fp32_groups
    for tensor in kept:
        moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
        step = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)
        optimizer.state[tensor] = {"step": step, **moments}

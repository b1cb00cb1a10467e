"""AdamW's moments in and out of ZeRO, whole and by parameter, whatever the stage keeps them in.

Stage 0 has them beside the parameters. Stages 1 and 2 cut a flat group of parameters into a part a rank, stage 3 every
parameter: DeepSpeed's own accessors gather them; they are set part by part, because its setter for whole tensors
does not take the padding of stage 3.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state
from torch import nn

from mbdist.checkpoint import Checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps that were taken; 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def tie_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let DeepSpeed's accessors find all moments that there are. By itself stages 1 and 2 tie parameters to theirs
    once, within the first step, and only those of the first group."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def full_moment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> torch.Tensor:
    """One moment of a parameter, of the parameter's shape. All ranks call it together."""
    if parameter in optimizer.state:
        return optimizer.state[parameter][key].clone()
    return safe_get_full_optimizer_state(parameter, key)


def restore_moments(
    engine: deepspeed.DeepSpeedEngine,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],  # by name, those that train
    steps: int,
    saved: Checkpoint,
) -> None:
    """Give an optimizer that has not stepped yet the moments and the step count of a checkpoint."""
    stage = engine.zero_optimization_stage()
    match stage:
        case 0:
            kept = list(parameters.values())
        case 3:
            kept = engine.optimizer.fp32_partitioned_groups_flat
        case _:
            kept = engine.optimizer.single_partition_of_fp32_groups
    for tensor in kept:
        moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
        optimizer.state[tensor] = {
            "step": torch.tensor(float(steps), dtype=torch.float32, device=tensor.device),
            **moments,
        }
    tie_moments(engine)
    for name, parameter in parameters.items():
        for key in MOMENTS:
            if stage == 3:
                part = parameter.ds_tensor.numel()
                first = part * torch.distributed.get_rank()
                count = max(0, min(part, parameter.ds_numel - first))
                values = saved.read(f"float/{name}/{key}", first, count)
                padded = torch.nn.functional.pad(values, (0, part - count)).to(parameter.ds_tensor.device)
                safe_set_local_optimizer_state(parameter, padded, key)
                continue
            value = saved.whole(f"float/{name}/{key}", parameter).to(parameter.device)
            if stage == 0:
                optimizer.state[parameter][key].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)

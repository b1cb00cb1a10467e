"""A model gets its memory: every tensor is made where it will stay and filled from where its content comes from.

The model comes with its parameters on the meta device. Each is made whole, empty; at ZeRO stage 3 DeepSpeed cuts it at
once and frees all but this rank's part (memory that was never written, so on a CPU never there), which is then filled.
Nothing is sent: ranks have agreed before that their files are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mbdist.comm.activity import Activity
from mbdist.comm.partition import WordPartition
from mbdist.config.schema import RunConfig
from mbdist.engine.deepspeed_config import deepspeed_config
from mbdist.engine.zero3 import keep_resident
from mbdist.free_memory import giving_back_at_once
from mbdist.model.layers import boolean_layers
from mbdist.model.weights import Weights
from mbdist.optim.accumulated import trained_planes


def place(
    student: nn.Module,  # parameters on the meta device, of the types that they shall have
    weights: Weights,
    config: RunConfig,
    device: torch.device,
    activity: Activity | None = None,  # is told of every parameter
) -> None:
    """Give every parameter and buffer of the student its memory and content."""
    if config.cluster.zero_stage == 3:
        keep_resident(student, resident_parameters(student, config))
        settings = deepspeed_config(config, list(student.named_parameters()))
        place_partitioned(student, weights, settings, device, activity)
    else:
        _place(student, weights, device, None, activity)


def place_partitioned(
    model: nn.Module, weights: Weights, settings: dict, device: torch.device, activity: Activity | None = None
) -> None:
    """The same of any model under stage 3: parameters partitioned, buffers whole. ``settings``: DeepSpeed's."""
    deepspeed.init_distributed()  # takes over the group that is there
    zero = deepspeed.zero.Init(nn.Module(), config_dict_or_path=settings, dtype=torch.float32)
    _place(model, weights, device, zero, activity)


def _place(
    model: nn.Module,
    weights: Weights,
    device: torch.device,
    zero: deepspeed.zero.Init | None,  # partitions, where it is given
    activity: Activity | None,
) -> None:
    saved = model.state_dict().keys()

    def parameter(name: str, empty: torch.Tensor) -> nn.Parameter:
        if activity is not None:
            activity.enter(f"placing {name}")
        made = nn.Parameter(torch.empty_like(empty, device=device), empty.requires_grad)
        if zero is None:
            weights.fill(name, 0, made.data.view(-1))
        else:
            part, rank = WordPartition(made.numel(), dist.get_world_size()), dist.get_rank()  # DeepSpeed's cut
            zero._convert_to_deepspeed_param(made)
            made.partition()
            weights.fill(name, part.first_word(rank), made.ds_tensor[: part.words_owned(rank)])
        return made

    def buffer(name: str, current: torch.Tensor) -> torch.Tensor:
        if name not in saved:  # made by the model itself
            return current.to(device)
        values = torch.empty_like(current, device=device)
        weights.fill(name, 0, values.view(-1))
        return values

    with giving_back_at_once():
        _remake(model, "_parameters", parameter)
        _remake(model, "_buffers", buffer)


def _remake(model: nn.Module, kind: str, make: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Put ``make(name, tensor)`` in the place of every tensor of a kind; a tied one is made once."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        tensors = getattr(module, kind)
        for leaf, tensor in tensors.items():
            if tensor is not None:
                if tensor not in made:
                    made[tensor] = make(f"{prefix}.{leaf}".lstrip("."), tensor)
                tensors[leaf] = made[tensor]


def resident_parameters(student: nn.Module, config: RunConfig) -> Iterator[nn.Parameter]:
    """What ZeRO-3 leaves whole on every rank."""
    planes, floats = config.comm.resident_planes, config.comm.resident_floats
    for _, layer in boolean_layers(student):
        trained = trained_planes(config.boolean.planes, layer.num_planes)
        for k, plane in enumerate(layer.planes):
            if planes == "all" or (planes == "frozen" and k not in trained):
                yield plane
    if floats == "frozen":
        yield from (p for p in student.parameters() if p.is_floating_point() and not p.requires_grad)

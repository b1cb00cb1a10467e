"""AdamW of the scales, with the one thing that ZeRO's fp32 path lacks: a step that is not taken."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from mbdist.config.schema import FloatOptimizerConfig
from mbdist.model.layers import is_scale


def optimizer_bytes(optimizer: torch.optim.Optimizer, weights: Iterable[torch.Tensor], copies: int = 1) -> int:
    """Bytes of weights (``copies`` times: 2 counts their gradients), of the fp32 masters that ZeRO puts in the
    optimizer's groups where they are not the weights themselves, and of the optimizer's moments."""
    kept = {id(weight): copies * weight.nbytes for weight in weights}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept.setdefault(id(parameter), parameter.nbytes)
    for state in optimizer.state.values():
        kept.update({id(value): value.nbytes for value in state.values() if torch.is_tensor(value)})
    return sum(kept.values())


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],  # those to be trained
    config: FloatOptimizerConfig,
) -> list[dict]:
    """AdamW groups with learning rates relative to the parameters: times the mean magnitude of the tensor, to the
    nearest power of two. AdamW moves every element by about its learning rate, so one value then means the same share
    of a tensor a step in every model. Powers of two, because ZeRO keeps a flat buffer a group and hundreds would be
    slow."""
    groups: dict[tuple[float, int], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named_parameters:
        lr = config.lr if is_scale(name) else config.also_train_lr
        octave = 0
        if config.relative_lr and (magnitude := parameter.detach().abs().float().mean().item()) > 0:
            octave = round(math.log2(magnitude))
        groups[lr, octave].append(parameter)
    return [{"params": groups[lr, octave], "lr": lr * 2.0**octave} for lr, octave in sorted(groups, reverse=True)]


class SkippableAdamW(torch.optim.AdamW):
    """torch's AdamW; while ``skip`` is set, a step leaves parameters and moments as they are."""

    skip = False

    def step(self, closure=None):
        if self.skip:
            return None
        return super().step(closure)

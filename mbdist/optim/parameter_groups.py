"""Learning rates of the trained floats: shares of their size."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from mbdist.config.schema import FloatOptimizerConfig
from mbdist.model.layers import is_scale


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

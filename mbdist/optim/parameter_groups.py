"""Learning rates of the trained floats: shares of their size."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from mbdist.comm.communicator import Communicator
from mbdist.comm.partition import WordPartition
from mbdist.config.optimizers import FloatOptimizerConfig
from mbdist.model.layers import is_scale
from mbdist.model.weights import Weights


def mean_magnitudes(
    named_parameters: Iterable[tuple[str, nn.Parameter]],  # whole or on the meta device: their shapes matter
    weights: Weights,
    communicator: Communicator,
) -> dict[str, float]:
    """Mean absolute value of every parameter, by name, with every rank reading its part. Sums are fp64 and the same on
    all ranks. All ranks call it together."""
    numbers, sums = {}, []
    for name, parameter in named_parameters:
        numbers[name] = parameter.numel()
        part = WordPartition(parameter.numel(), communicator.world_size)
        values = torch.empty(part.words_owned(communicator.rank), dtype=torch.float32)
        weights.fill(name, part.first_word(communicator.rank), values)
        sums.append(values.abs().sum(dtype=torch.float64))
    of_ranks = communicator.all_gather_objects(torch.stack(sums).tolist(), "agreement")
    totals = map(math.fsum, zip(*of_ranks, strict=True))
    return {name: total / numbers[name] for name, total in zip(numbers, totals, strict=True)}


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],  # those to be trained
    config: FloatOptimizerConfig,
    magnitudes: Mapping[str, float] | None = None,  # by name; None: of the parameters as they are
) -> list[dict]:
    """AdamW groups with learning rates relative to the parameters: times the mean magnitude of the tensor, to the
    nearest power of two. AdamW moves every element by about its learning rate, so one value then means the same share
    of a tensor a step in every model. Powers of two, because ZeRO keeps a flat buffer a group and hundreds would be
    slow."""
    groups: dict[tuple[float, int], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named_parameters:
        lr = config.lr if is_scale(name) else config.also_train_lr
        octave = 0
        if config.relative_lr:
            magnitude = magnitudes[name] if magnitudes else parameter.detach().abs().float().mean().item()
            octave = round(math.log2(magnitude)) if magnitude > 0 else 0
        groups[lr, octave].append(parameter)
    return [{"params": groups[lr, octave], "lr": lr * 2.0**octave} for lr, octave in sorted(groups, reverse=True)]

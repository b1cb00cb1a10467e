"""Which floats of a model train, and in what type the others rest."""

from __future__ import annotations

import fnmatch

import torch
from transformers import PreTrainedModel

from mbdist.errors import UserError
from mbdist.model.layers import is_scale


def choose_trained_floats(model: PreTrainedModel, patterns: list[str], dtype: torch.dtype) -> None:
    """Scales, and float parameters that match a pattern, are trained in fp32; all others are frozen in ``dtype``.

    Raises UserError for a pattern that matches nothing.
    """
    unused = set(patterns)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
        unused -= matching
        parameter.requires_grad = bool(matching) or is_scale(name)
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    if unused:
        names = ", ".join(
            name for name, p in model.named_parameters() if p.is_floating_point() and "scale_" not in name
        )
        raise UserError(f"floats.also_train: no parameter matches {', '.join(sorted(unused))}; there are {names[:400]}")

"""AdamW of the scales, with the one thing that ZeRO's fp32 path lacks: a step that is not taken."""

from __future__ import annotations

from collections.abc import Iterable

import torch


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


class SkippableAdamW(torch.optim.AdamW):
    """torch's AdamW; while ``skip`` is set, a step leaves parameters and moments as they are."""

    skip = False

    def step(self, closure=None):
        if self.skip:
            return None
        return super().step(closure)

"""AdamW of the scales, with the one thing that ZeRO's fp32 path lacks: a step that is not taken."""

from __future__ import annotations

import torch


class SkippableAdamW(torch.optim.AdamW):
    """torch's AdamW; while ``skip`` is set, a step leaves parameters and moments as they are."""

    skip = False

    def step(self, closure=None):
        if self.skip:
            return None
        return super().step(closure)

"""The text that an initialisation is calibrated on."""

from __future__ import annotations

import math

import datasets
import torch

BATCH_TOKENS = 2048  # tokens of one forward and backward pass


def calibration_batches(
    windows: datasets.Dataset,  # of the calibration text; training windows where there is none
    tokens: int,
) -> list[torch.Tensor]:
    """The first ``tokens`` tokens in whole windows: (batch, window) int64 each."""
    windows = windows.with_format("torch")
    window = len(windows[0]["input_ids"])
    chosen = windows.select(range(min(len(windows), math.ceil(tokens / window))))
    return [batch["input_ids"].long() for batch in chosen.iter(batch_size=max(1, BATCH_TOKENS // window))]

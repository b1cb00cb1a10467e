"""The weights of a run that goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mbdist.checkpoint.reader import Checkpoint
from mbdist.errors import UserError
from mbdist.model.weights import Weights


class ResumedWeights:
    """What a checkpoint has of a model, and the rest as the run started with it.

    Raises UserError where the checkpoint lacks a parameter that trains.
    """

    def __init__(self, saved: Checkpoint, start: Weights, trained: Iterable[str]):
        self._saved = saved
        self._start = start
        for name in trained:
            if _float_key(name) not in saved:
                raise UserError(f"{saved.folder} does not have {name}, which trains in this run")

    def fill(self, name: str, first: int, out: torch.Tensor) -> None:
        key = f"plane/{name}" if out.dtype == torch.int32 else _float_key(name)
        if key in self._saved:
            out.copy_(self._saved.read(key, first, out.numel()))
        else:
            self._start.fill(name, first, out)


def _float_key(name: str) -> str:
    return f"float/{name}/value"

"""The order of the data: a function of the seed and the global sample number alone, not of the workers.

Sample s of the run is window ``permutation(epoch)[s mod N]`` with epoch = s div N. Step t uses samples t B to
t B + B - 1; contribution g of it (micro-batch a of rank r, g = a R + r) the next ``micro_batch`` of them, so the same
global batch is cut the same way for any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import torch


@dataclass
class Batch:
    """One micro-batch of this rank."""

    input_ids: torch.Tensor  # (micro_batch, window) int64
    learned: torch.Tensor  # (micro_batch, window) bool: whether the token is a target
    windows: list[int]  # the numbers of its windows in the data

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.learned.to(device), self.windows)


class Batches:
    """Micro-batches by (step, accumulation index) for one rank."""

    def __init__(
        self,
        windows: datasets.Dataset,
        seed: int,
        sequences_per_step: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ):
        self.windows = windows
        self.seed = seed
        self.sequences_per_step = sequences_per_step
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self._orders: dict[int, np.ndarray] = {}

    def window_number(self, sample: int) -> int:
        """Which window the run's sample number ``sample`` is."""
        epoch, position = divmod(sample, len(self.windows))
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))}
        return int(self._orders[epoch][position])

    def micro_batch_at(self, step: int, accumulation: int) -> Batch:
        contribution = accumulation * self.world_size + self.rank
        first = step * self.sequences_per_step + contribution * self.micro_batch
        return fetch(self.windows, [self.window_number(first + i) for i in range(self.micro_batch)])


def fetch(windows: datasets.Dataset, numbers: list[int]) -> Batch:
    rows = windows[numbers]
    return Batch(rows["input_ids"].long(), rows["learned"].bool(), numbers)

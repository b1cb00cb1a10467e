"""The collectives of a run of any size in one process: nothing is sent, everything is counted."""

from __future__ import annotations

from typing import TypeVar

import torch

from mbdist.comm.activity import Activity
from mbdist.comm.communicator import Communicator

T = TypeVar("T")


class PaperCommunicator(Communicator):
    """Worker 0 of many who all say what it says. What arrives has the right size and no meaning."""

    def __init__(self, workers: int):
        super().__init__(alone=True)
        self.world_size = workers
        self.activity = Activity()

    def _new_group(self, ranks):
        return None

    def all_to_all(self, send: torch.Tensor, received: torch.Tensor, phase: str) -> None:
        self.count(phase, send.nbytes * (self.world_size - 1) // self.world_size)

    def all_reduce_sum(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        self.count(phase, 2 * tensor.nbytes * (self.world_size - 1) // self.world_size)
        return tensor

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        self.count(phase, tensor.nbytes * (self.world_size - 1))
        return tensor.new_empty(self.world_size, *tensor.shape)

    def all_gather_objects(self, value: T, phase: str) -> list[T]:
        return [value] * self.world_size

"""Planes under ZeRO-3: every rank holds its flat part of every plane, and the owner of the part owns its flips."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbdist.comm.partition import WordPartition
from mbdist_kernels import xor_apply


class PartitionedPlanes:
    """A ``PlaneStore`` over DeepSpeed's partitions. The next gather distributes the flips: they cost no message."""

    def __init__(self, planes: Sequence[Sequence[torch.nn.Parameter]], partitions: Sequence[WordPartition]):
        for of_matrix, partition in zip(planes, partitions, strict=True):
            for plane in of_matrix:
                if plane.ds_tensor.numel() != partition.words_per_rank:
                    raise RuntimeError(
                        f"DeepSpeed cut a plane of {partition.num_words} words into parts of "
                        f"{plane.ds_tensor.numel()}, not {partition.words_per_rank}: this DeepSpeed version partitions "
                        "differently"
                    )
        self.planes = planes

    def owned_words(self, matrix: int, k: int) -> torch.Tensor:
        return self.planes[matrix][k].ds_tensor.data

    def apply(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        for (matrix, k), mask in masks.items():
            xor_apply(self.planes[matrix][k].ds_tensor.data, mask)

    def check_replicas(self, names: Sequence[str]) -> str | None:
        return None  # there is one copy of every word

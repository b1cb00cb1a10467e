"""Planes under ZeRO-3: every rank holds its flat part of every plane, and the owner of the part owns its flips."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbdist.comm.partition import WordPartition


class PartitionedPlanes:
    """A ``PlaneStore`` over DeepSpeed's partitions. The next gather distributes the flips: they cost no message."""

    def __init__(self, planes: Sequence[torch.nn.Parameter], partitions: Sequence[WordPartition]):
        for plane, partition in zip(planes, partitions, strict=True):
            if plane.ds_tensor.numel() != partition.words_per_rank:
                raise RuntimeError(
                    f"DeepSpeed cut a plane of {partition.num_words} words into parts of {plane.ds_tensor.numel()}, "
                    f"not {partition.words_per_rank}: this DeepSpeed version partitions differently"
                )
        self.planes = planes

    def owned_words(self, index: int) -> torch.Tensor:
        return self.planes[index].ds_tensor.data

    def apply(self, masks: Sequence[torch.Tensor]) -> None:
        for plane, mask in zip(self.planes, masks, strict=True):
            plane.ds_tensor.data.bitwise_xor_(mask)

    def check_replicas(self, names: Sequence[str]) -> str | None:
        return None  # there is one copy of every word

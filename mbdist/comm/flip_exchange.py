"""Phase 4: the flips that owners decided reach every copy of the planes.

A plane set knows where the words of a trained plane live. Replicated (ZeRO 0-2): every rank holds all words, so the
owners' masks are gathered and every rank XORs them in. Partitioned (ZeRO 3): the owner's words are the only ones, so
nothing is sent (``mbdist.engine.zero3``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

from mbdist.comm.communicator import Communicator
from mbdist.comm.partition import WordPartition


class PlaneStore(Protocol):
    """Where the trained planes' words live."""

    def owned_words(self, index: int) -> torch.Tensor:
        """This rank's words of the trained plane of matrix ``index``: int32 (P,)."""

    def apply(self, masks: Sequence[torch.Tensor]) -> None:
        """XOR the owner's masks, one (P,) tensor a matrix, into every copy."""

    def check_replicas(self, names: Sequence[str]) -> str | None:
        """Name of the first plane that differs between ranks, or None. All ranks call it together."""


class ReplicatedPlanes:
    """Every rank holds every word (ZeRO stages 0, 1, 2)."""

    def __init__(
        self,
        planes: Sequence[torch.Tensor],  # trained planes, (m, W) int32 each, changed in place by apply
        partitions: Sequence[WordPartition],
        communicator: Communicator,
    ):
        self.planes = planes
        self.partitions = partitions
        self.communicator = communicator

    def owned_words(self, index: int) -> torch.Tensor:
        return self.partitions[index].owned(self.planes[index].data, self.communicator.rank)

    def apply(self, masks: Sequence[torch.Tensor]) -> None:
        gathered = self.communicator.all_gather(torch.cat(list(masks)), "flips")  # (R, sum of P)
        parts = gathered.split([mask.numel() for mask in masks], dim=1)
        for plane, partition, part in zip(self.planes, self.partitions, parts, strict=True):
            plane.data.view(-1).bitwise_xor_(part.reshape(-1)[: partition.num_words])

    def check_replicas(self, names: Sequence[str]) -> str | None:
        digests = [hashlib.sha256(plane.data.cpu().numpy().tobytes()).digest()[:8] for plane in self.planes]
        local = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).to(self.planes[0].device)
        everywhere = self.communicator.all_gather(local, "plane_check")
        differs = (everywhere != everywhere[0]).any(0).nonzero().flatten().tolist()
        return names[differs[0]] if differs else None

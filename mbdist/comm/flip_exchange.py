"""Phase 4: the flips that owners decided reach every copy of the planes.

A plane store knows where the words of the planes live. Replicated (ZeRO 0-2): every rank holds all words, so the
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
from mbdist_kernels import xor_apply


class PlaneStore(Protocol):
    """Where the planes' words live. A plane is named by (number of its matrix, its number k in it)."""

    def owned_words(self, matrix: int, k: int) -> torch.Tensor:
        """This rank's words of a plane: int32 (P,)."""

    def apply(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        """XOR the owner's masks, (P,) by plane, into every copy. All ranks name the same planes in the same order."""

    def check_replicas(self, names: Sequence[str]) -> str | None:
        """Name of the first plane that differs between ranks, or None. ``names``: of all planes of all matrices, in
        order. All ranks call it together."""


class ReplicatedPlanes:
    """Every rank holds every word (ZeRO stages 0, 1, 2)."""

    def __init__(
        self,
        planes: Sequence[Sequence[torch.Tensor]],  # of every matrix its planes, (m, W) int32, changed by apply
        partitions: Sequence[WordPartition],  # of every matrix
        communicator: Communicator,
    ):
        self.planes = planes
        self.partitions = partitions
        self.communicator = communicator

    def owned_words(self, matrix: int, k: int) -> torch.Tensor:
        return self.partitions[matrix].owned(self.planes[matrix][k].data, self.communicator.rank)

    def apply(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        gathered = self.communicator.all_gather(torch.cat(list(masks.values())), "flips")  # (R, sum of P)
        parts = gathered.split([mask.numel() for mask in masks.values()], dim=1)
        for (matrix, k), part in zip(masks, parts, strict=True):
            xor_apply(self.planes[matrix][k].data, part)

    def check_replicas(self, names: Sequence[str]) -> str | None:
        digests = [
            hashlib.sha256(plane.data.cpu().numpy().tobytes()).digest()[:8]
            for planes in self.planes
            for plane in planes
        ]
        local = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).to(self.planes[0][0].device)
        everywhere = self.communicator.all_gather(local, "plane_check")
        differs = (everywhere != everywhere[0]).any(0).nonzero().flatten().tolist()
        return names[differs[0]] if differs else None

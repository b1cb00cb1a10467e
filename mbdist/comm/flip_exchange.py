"""Phase 4: the flips that owners decided reach every copy of the planes.

A plane store knows where the words of the planes live. Replicated (ZeRO 0-2): every rank holds all words, so the
owners' masks are gathered, as positions where flips are few, and every rank XORs them in. Partitioned (ZeRO 3): the
owner's words are the only ones, so nothing is sent (``mbdist.engine.zero3``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

from mbdist.comm.communicator import Communicator
from mbdist.comm.partition import WordPartition
from mbdist_kernels import flip_apply_sparse, flip_counts, flip_encode_sparse, xor_apply


class PlaneStore(Protocol):
    """Where the planes' words live. A plane is named by (number of its matrix, its number k in it)."""

    def owned_words(self, matrix: int, k: int) -> torch.Tensor:
        """This rank's words of a plane: int32 (P,)."""

    def apply(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        """XOR the owner's masks, (P,) by plane, into every copy. All ranks name the same planes in the same order."""

    def check_replicas(self, names: Sequence[str]) -> str | None:
        """Name of the first plane that differs between ranks, or None. ``names``: of all planes of all matrices, in
        order. All ranks call it together."""


def gather_masks(
    communicator: Communicator,
    mask: torch.Tensor,  # (P,) int32: this rank's
    bucket_bytes: int,
) -> torch.Tensor:
    """Every rank's mask, (R, P), each bucket of it sent as words or as positions, whichever is smaller.

    All ranks know from a header how many flips each has in a bucket, so they agree on its form and size: none waits for
    another size, and no number of flips is too large.
    """
    if communicator.world_size == 1:
        return mask[None]
    buckets = mask.split(max(1, bucket_bytes // mask.element_size()))
    by_block = [flip_counts(bucket) for bucket in buckets]
    counts = torch.stack([blocks.sum(dtype=torch.int32) for blocks in by_block])
    flips = communicator.all_gather(counts, "flip_counts").cpu()  # (R, buckets)
    gathered = []
    for bucket, blocks, of_ranks in zip(buckets, by_block, flips.T, strict=True):
        most = int(of_ranks.max())
        most += most % 2  # whole words
        if most == 0:
            gathered.append(mask.new_zeros(communicator.world_size, len(bucket)))
        elif len(blocks) + most // 2 < len(bucket):
            positions = flip_encode_sparse(bucket, blocks)
            padded = torch.nn.functional.pad(positions.view(torch.int16), (0, most - len(positions)))
            messages = communicator.all_gather(torch.cat([blocks, padded.view(torch.int32)]), "flips")
            gathered.append(torch.stack([_mask_of(message, len(blocks), len(bucket)) for message in messages]))
        else:
            gathered.append(communicator.all_gather(bucket, "flips"))
    return torch.cat(gathered, dim=1)


def _mask_of(
    message: torch.Tensor,  # (blocks + ..,) int32: flips a block, then their positions
    num_blocks: int,
    num_words: int,
) -> torch.Tensor:
    blocks, positions = message.tensor_split([num_blocks])
    mask = message.new_zeros(num_words)
    flip_apply_sparse(mask, positions.view(torch.uint16)[: int(blocks.sum())], blocks)
    return mask


class ReplicatedPlanes:
    """Every rank holds every word (ZeRO stages 0, 1, 2)."""

    def __init__(
        self,
        planes: Sequence[Sequence[torch.Tensor]],  # of every matrix its planes, (m, W) int32, changed by apply
        partitions: Sequence[WordPartition],  # of every matrix
        communicator: Communicator,
        bucket_bytes: int = 25 << 20,  # of masks
    ):
        self.planes = planes
        self.partitions = partitions
        self.communicator = communicator
        self.bucket_bytes = bucket_bytes

    def owned_words(self, matrix: int, k: int) -> torch.Tensor:
        return self.partitions[matrix].owned(self.planes[matrix][k].data, self.communicator.rank)

    def apply(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        gathered = gather_masks(self.communicator, torch.cat(list(masks.values())), self.bucket_bytes)  # (R, sum of P)
        parts = gathered.split([mask.numel() for mask in masks.values()], dim=1)
        for (matrix, k), part in zip(masks, parts, strict=True):
            xor_apply(self.planes[matrix][k].data, part)

    def check_replicas(self, names: Sequence[str]) -> str | None:
        return self.check([plane for planes in self.planes for plane in planes], names)

    def check(self, planes: Sequence[torch.Tensor], names: Sequence[str]) -> str | None:
        """``check_replicas`` of some planes."""
        if not planes:
            return None
        digests = [hashlib.sha256(plane.data.cpu().numpy().tobytes()).digest()[:8] for plane in planes]
        local = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).to(planes[0].device)
        everywhere = self.communicator.all_gather(local, "plane_check")
        differs = (everywhere != everywhere[0]).any(0).nonzero().flatten().tolist()
        return names[differs[0]] if differs else None

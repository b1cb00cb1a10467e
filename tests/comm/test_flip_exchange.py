"""Masks of flips reach every rank bit for bit, in words or in positions."""

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import gather_masks

WORDS = 5000  # two blocks of positions and a part of one
BUCKETS = (1 << 20, 9000, 4)  # bytes: all at once; some; a word each (for the small masks)


def mask_of(rank, flips, words=WORDS):
    bits = np.zeros(words * 32, dtype=bool)
    bits[np.random.default_rng(rank).choice(words * 32, flips(rank), replace=False)] = True
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


CASES = {
    "none": (lambda rank: 0, WORDS),
    "few, on some ranks": (lambda rank: 37 * rank, WORDS),
    "an odd number": (lambda rank: 1 + 2 * rank, WORDS),
    "many on one rank": (lambda rank: 100_000 if rank == 1 else 3, WORDS),
    "all": (lambda rank: WORDS * 32, WORDS),
    "one word": (lambda rank: 1, 1),
}


def _main():
    communicator = Communicator(60)
    found = {}
    for name, (flips, words) in CASES.items():
        for bucket in BUCKETS:
            if bucket > 4 or words < 10:
                masks = gather_masks(communicator, mask_of(communicator.rank, flips, words), bucket)
                found[name, bucket] = (masks, communicator.bytes_sent["flips"])
                communicator.bytes_sent.clear()
    return found


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_rank_gets_every_mask(tmp_path, world_size):
    peers = world_size - 1
    for found in run_on_ranks(world_size, tmp_path, _main):
        for (name, bucket), (masks, sent) in found.items():
            flips, words = CASES[name]
            expected = torch.stack([mask_of(r, flips, words) for r in range(world_size)])
            assert torch.equal(masks, expected), (name, bucket)
            assert sent <= words * 4 * peers, "never more than the words themselves"
            if name == "none":
                assert sent == 0
            if name == "few, on some ranks" and bucket == BUCKETS[0]:
                most = 37 * peers
                assert sent == (2 * (most + most % 2) + 4 * 3) * peers, "two bytes a flip, and the counts of 3 blocks"


def test_one_rank_sends_nothing():
    mask = mask_of(0, lambda rank: 5)
    communicator = Communicator(alone=True)
    assert torch.equal(gather_masks(communicator, mask, 100), mask[None])
    assert not communicator.bytes_sent

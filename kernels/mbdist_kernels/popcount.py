"""How many bits are set. Worked example: the words 70 (0b01000110) and -1 have 3 + 32 = 35."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from mbdist_kernels.launch import settings
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_bits_reference


def popcount(words: torch.Tensor) -> int:
    """Number of bits set in all words (int32, any shape). On a GPU it waits for the result."""
    return int(_popcount(words))


def popcount_cpu(words: torch.Tensor) -> torch.Tensor:
    """By numpy."""
    return torch.tensor(int(np.bitwise_count(words.detach().numpy().view(np.uint32)).sum()))


def popcount_reference(words: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    return unpack_bits_reference(words).sum()


def popcount_triton(words: torch.Tensor) -> torch.Tensor:
    """On a GPU: a count a block, then their sum."""
    words = words.contiguous()
    chosen = settings("popcount")
    grid = -(-words.numel() // chosen["BLOCK"])
    counts = torch.empty(grid, dtype=torch.int32, device=words.device)
    if grid:
        _popcount_kernel[(grid,)](words, counts, words.numel(), **chosen)
    return counts.sum()


@triton.jit
def ones_in_word(word):
    """Bits set in each int32; LLVM makes one POPC of it."""
    count = word.to(tl.uint32, bitcast=True)
    count = count - ((count >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    return ((count * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _popcount_kernel(words, counts, num_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + at, mask=at < num_words, other=0)
    tl.store(counts + tl.program_id(0), tl.sum(ones_in_word(word)))


_popcount = operation(
    "popcount(Tensor words) -> Tensor",
    cpu=popcount_cpu,
    cuda=popcount_triton,
    fake=lambda words: words.new_empty((), dtype=torch.int64),
)

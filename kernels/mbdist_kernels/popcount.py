"""How many bits are set, in all words or block by block.

Worked example: the words 70 (0b01000110), -1 and 1 have 3 + 32 + 1 = 36; in blocks of 2 words, (35, 1).
"""

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
    return int(_popcount(words, settings("popcount")["BLOCK"]).sum())


def popcount_by_block(
    words: torch.Tensor,  # int32, any shape
    block_words: int,  # a power of two
) -> torch.Tensor:
    """Bits set in each block of so many consecutive words, the last one ragged: int32 (blocks,)."""
    return _popcount(words, block_words)


def popcount_cpu(words: torch.Tensor, block_words: int) -> torch.Tensor:
    """By numpy."""
    ones = np.bitwise_count(words.detach().reshape(-1).numpy().view(np.uint32))
    starts = np.arange(0, words.numel(), block_words)
    return torch.from_numpy(np.add.reduceat(ones, starts, dtype=np.int32) if len(starts) else np.zeros(0, np.int32))


def popcount_reference(words: torch.Tensor, block_words: int) -> torch.Tensor:
    """In plain torch."""
    ones = unpack_bits_reference(words.reshape(-1, 1)).sum(1, dtype=torch.int32)
    blocks = -(-words.numel() // block_words)
    return torch.nn.functional.pad(ones, (0, blocks * block_words - len(ones))).view(blocks, -1).sum(1).int()


def popcount_triton(words: torch.Tensor, block_words: int) -> torch.Tensor:
    """On a GPU."""
    words = words.contiguous()
    blocks = -(-words.numel() // block_words)
    counts = torch.empty(blocks, dtype=torch.int32, device=words.device)
    if blocks:
        chosen = settings("popcount") | {"BLOCK": block_words}
        _popcount_kernel[(blocks,)](words, counts, words.numel(), **chosen)
    return counts


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
    "popcount(Tensor words, int block_words) -> Tensor",
    cpu=popcount_cpu,
    cuda=popcount_triton,
    fake=lambda words, block_words: words.new_empty(-(-words.numel() // block_words), dtype=torch.int32),
)

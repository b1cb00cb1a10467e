"""Majority of R sign words, bit by bit, without unpacking: counters are kept in bit slices.

Slice s of a counter word holds bit s of the 32 counts. Adding a word is a ripple of half adders over the slices. A bit
is set in the result where more than half of the words set it; in a tie the first word (rank 0's) decides.

Worked example, 3 words of 4 bits: 0b0011, 0b0101, 0b0110 have 0, 2, 2, 2 set (bit 3 first): majority 0b0111.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbdist_kernels.launch import settings
from mbdist_kernels.pack import pack_signs
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_bits_reference

_MOST_RANKS = 31
_CHUNK_WORDS = 1 << 16  # of a rank


def vote(
    words: torch.Tensor,  # (R, W) int32: one row a rank
) -> torch.Tensor:
    """The majority: int32 (W,)."""
    return _vote(words)


def vote_reference(words: torch.Tensor) -> torch.Tensor:
    """In plain torch, on unpacked bits: the oracle."""
    ranks = len(words)
    count = unpack_bits_reference(words).int().sum(0)
    first = unpack_bits_reference(words[0])
    majority = torch.where(2 * count == ranks, first, 2 * count > ranks)
    return pack_signs(torch.where(majority, -1.0, 1.0)[None])[0]


def vote_cpu(words: torch.Tensor) -> torch.Tensor:
    """In bit slices, by torch's integer operations, as many words at a time as stay in the cache."""
    return torch.cat([_vote_in_slices(chunk) for chunk in words.split(_CHUNK_WORDS, dim=1)])


def _vote_in_slices(words: torch.Tensor) -> torch.Tensor:
    ranks = len(words)
    slices = [torch.zeros_like(words[0]) for _ in range(ranks.bit_length())]
    for word in words:
        carry = word
        for s, counted in enumerate(slices):
            slices[s], carry = counted ^ carry, counted & carry
    half = ranks // 2
    more, equal = torch.zeros_like(words[0]), torch.full_like(words[0], -1)
    for s in range(len(slices) - 1, -1, -1):  # count > half, from the highest bit down
        if half >> s & 1:
            equal = equal & slices[s]
        else:
            more, equal = more | (equal & slices[s]), equal & ~slices[s]
    return more | (equal & words[0]) if ranks % 2 == 0 else more


def vote_triton(words: torch.Tensor) -> torch.Tensor:
    """On a GPU, one pass for up to 31 ranks."""
    ranks, width = words.shape
    if ranks > _MOST_RANKS:
        return vote_cpu(words)
    majority = torch.empty(width, dtype=torch.int32, device=words.device)
    chosen = settings("vote")
    if width:
        _vote_kernel[(-(-width // chosen["BLOCK"]),)](words.contiguous(), majority, width, RANKS=ranks, **chosen)
    return majority


@triton.jit
def _vote_kernel(words, majority, num_words, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_words
    # Counters of five slices that start at 31 - half: a count above half carries out of the highest.
    START: tl.constexpr = 31 - RANKS // 2
    none = tl.zeros((BLOCK,), tl.int32)
    c0, c1, c2 = none - (START & 1), none - (START >> 1 & 1), none - (START >> 2 & 1)
    c3, c4 = none - (START >> 3 & 1), none - (START >> 4 & 1)
    more = none
    for r in tl.static_range(RANKS):
        carry = tl.load(words + r * num_words + at, mask=inside, other=0)
        c0, carry = c0 ^ carry, c0 & carry
        c1, carry = c1 ^ carry, c1 & carry
        c2, carry = c2 ^ carry, c2 & carry
        c3, carry = c3 ^ carry, c3 & carry
        c4, carry = c4 ^ carry, c4 & carry
        more = more | carry
    if RANKS % 2 == 0:  # a tie is a count of half: all slices are 1
        more = more | (c0 & c1 & c2 & c3 & c4 & tl.load(words + at, mask=inside, other=0))
    tl.store(majority + at, more, mask=inside)


_vote = operation(
    "vote(Tensor words) -> Tensor",
    cpu=vote_cpu,
    cuda=vote_triton,
    fake=lambda words: words.new_empty(words.shape[1]),
)

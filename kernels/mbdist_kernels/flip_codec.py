"""Few flips on the wire: positions of the set bits, 16 bits each, in blocks of 65,536 elements.

A mask of 2048 words is one block: its flips are its bits' offsets, in order. The flips of all blocks stand one after
the other, with their number a block beside them: 16 bits a flip, less than the mask itself below one flip in 16.

Worked example: the mask whose elements 3, 70,000 and 70,001 are set has the counts (1, 2, ...) and the positions
(3, 4464, 4465).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

from mbdist_kernels.flip_mask import elements_of_mask
from mbdist_kernels.launch import settings
from mbdist_kernels.layout import WORD_BITS
from mbdist_kernels.popcount import popcount_by_block
from mbdist_kernels.registration import operation

BLOCK_WORDS = 2048
BLOCK_ELEMENTS = BLOCK_WORDS * WORD_BITS


def flip_counts(
    mask: torch.Tensor,  # (W,) int32
) -> torch.Tensor:
    """Flips in each block: int32 (ceil(W / 2048),). A pass over the mask, from which the size of either form is known
    before one is made."""
    return popcount_by_block(mask, BLOCK_WORDS)


def flip_encode_sparse(
    mask: torch.Tensor,  # (W,) int32
    counts: torch.Tensor,  # (blocks,) int32: its ``flip_counts``
) -> torch.Tensor:
    """Positions of all set bits in their blocks, in order: uint16 (C,). On a GPU it waits for their number."""
    return _encode(mask, counts).view(torch.uint16)


def encode_reference(mask: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """In plain torch; what the CPU uses too. Positions as int16: the low 16 bits as they are."""
    return (elements_of_mask(mask) % BLOCK_ELEMENTS).to(torch.int16)


def encode_triton(mask: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """On a GPU: a program a block, which knows from the counts where its flips stand."""
    ends = counts.cumsum(0, dtype=torch.int32)
    positions = torch.empty(int(counts.sum()), dtype=torch.int16, device=mask.device)
    chosen = settings("flip_encode_sparse")
    if positions.numel():
        _encode_kernel[(len(counts),)](mask.contiguous(), ends, counts, positions, mask.numel(), **chosen)
    return positions


@triton.jit
def _encode_kernel(mask, ends, counts, positions, num_words, BLOCK_WORDS: tl.constexpr):
    block = tl.program_id(0)
    at = tl.load(ends + block) - tl.load(counts + block)
    place = tl.arange(0, 32 * BLOCK_WORDS)
    for start in range(0, 2048, BLOCK_WORDS):
        word = block.to(tl.int64) * 2048 + start + tl.arange(0, BLOCK_WORDS)
        packed = tl.load(mask + word, mask=word < num_words, other=0)
        bit = ((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1).reshape(32 * BLOCK_WORDS)
        target = positions + at + tl.cumsum(bit, 0) - 1
        tl.store(target, (start * 32 + place).to(tl.int16), mask=bit == 1)
        at += tl.sum(bit)


def _positions_of_unknown_number(mask: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(library.get_ctx().new_dynamic_size(), dtype=torch.int16)


_encode = operation(
    "flip_encode_sparse(Tensor mask, Tensor counts) -> Tensor",
    cpu=encode_reference,
    cuda=encode_triton,
    fake=_positions_of_unknown_number,
)


def flip_apply_sparse(
    words: torch.Tensor,  # (W,) int32, contiguous; changed in place
    positions: torch.Tensor,  # (C,) uint16
    counts: torch.Tensor,  # (blocks,) int32
) -> None:
    """XOR the encoded flips into the words: what ``xor_apply`` does with the mask. Raises ValueError where the words
    are not contiguous."""
    torch._check_value(words.is_contiguous(), lambda: "flip_apply_sparse changes contiguous words")
    _apply(words, positions.view(torch.int16), counts)


def apply_reference(words: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
    """In plain torch; what the CPU uses too. Positions as int16."""
    block = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    elements = block * BLOCK_ELEMENTS + (positions.int() & 0xFFFF)
    mask = torch.zeros_like(words)
    mask.index_add_(0, elements // WORD_BITS, (1 << (elements % WORD_BITS)).int())  # disjoint bits: a sum is an or
    words.bitwise_xor_(mask)


def apply_triton(words: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
    """On a GPU: a program a block; flips of one word meet in an atomic XOR, whose order does not matter."""
    chosen = settings("flip_apply_sparse")
    if positions.numel():
        ends = counts.cumsum(0, dtype=torch.int32)
        _apply_kernel[(len(counts),)](words, positions, ends, counts, **chosen)


@triton.jit
def _apply_kernel(words, positions, ends, counts, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    end = tl.load(ends + block)
    at = end - tl.load(counts + block)
    while at < end:
        flip = at + tl.arange(0, BLOCK)
        inside = flip < end
        position = tl.load(positions + flip, mask=inside, other=0).to(tl.int32) & 0xFFFF
        word = block.to(tl.int64) * 2048 + position // 32
        tl.atomic_xor(words + word, 1 << (position % 32), mask=inside)
        at += BLOCK


_apply = operation(
    "flip_apply_sparse(Tensor(a!) words, Tensor positions, Tensor counts) -> ()",
    cpu=apply_reference,
    cuda=apply_triton,
    fake=lambda words, positions, counts: None,
)

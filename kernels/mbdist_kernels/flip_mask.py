"""Elements of a plane as the mask whose bits they are, and back. Applying a mask is an XOR: see ``xor_apply``.

Element e is bit e % 32 of word e // 32. Worked example: the elements 0, 31, 33 of 2 words are the mask (0x80000001, 2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbdist_kernels.launch import settings
from mbdist_kernels.layout import WORD_BITS
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_bits


def flip_mask(
    elements: torch.Tensor,  # (C,) int32, distinct
    num_words: int,
) -> torch.Tensor:
    """int32 (num_words,): bit 1 at these elements."""
    return _flip_mask(elements, num_words)


def elements_of_mask(
    mask: torch.Tensor,  # (W,) int32
) -> torch.Tensor:
    """The elements whose bit is 1, in order: int32. On a GPU it waits for their number."""
    words = mask.nonzero()[:, 0]  # few: bits are looked for in these alone
    which, bit = unpack_bits(mask[words, None]).nonzero(as_tuple=True)
    return (words[which] * WORD_BITS + bit).int()


def flip_mask_reference(elements: torch.Tensor, num_words: int) -> torch.Tensor:
    """In plain torch; what the CPU uses too."""
    mask = torch.zeros(num_words, dtype=torch.int32, device=elements.device)
    bits = torch.ones_like(elements) << (elements % WORD_BITS)
    return mask.index_add_(0, elements // WORD_BITS, bits)  # bits are disjoint, so a wrapping sum is an or


def flip_mask_triton(elements: torch.Tensor, num_words: int) -> torch.Tensor:
    """On a GPU; elements of one word meet in an atomic or, whose order does not matter."""
    mask = torch.zeros(num_words, dtype=torch.int32, device=elements.device)
    chosen = settings("flip_mask")
    if count := elements.numel():
        _mask_kernel[(-(-count // chosen["BLOCK"]),)](elements.contiguous(), mask, count, **chosen)
    return mask


@triton.jit
def _mask_kernel(elements, mask, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    element = tl.load(elements + at, mask=inside, other=0)
    tl.atomic_or(mask + element // 32, 1 << (element % 32), mask=inside)


_flip_mask = operation(
    "flip_mask(Tensor elements, int num_words) -> Tensor",
    cpu=flip_mask_reference,
    cuda=flip_mask_triton,
    fake=lambda elements, num_words: elements.new_empty(num_words),
)

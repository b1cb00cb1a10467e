"""Flips applied: words ^= mask. Worked example: word 0b0110 with mask 0b0011 becomes 0b0101; applied again, 0b0110."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbdist_kernels.launch import settings
from mbdist_kernels.registration import operation


def xor_apply(
    words: torch.Tensor,  # int32, contiguous, any shape; changed in place
    mask: torch.Tensor,  # int32, as many words or more
) -> None:
    """XOR the first words of ``mask`` (ownership pads the last part) into ``words``. Raises ValueError where these are
    not contiguous or the mask is shorter."""
    fits = words.is_contiguous() and mask.numel() >= words.numel()
    torch._check_value(fits, lambda: "xor_apply changes contiguous words, by a mask of as many or more")
    _xor_apply(words, mask)


def xor_apply_reference(words: torch.Tensor, mask: torch.Tensor) -> None:
    """In plain torch, one pass; what the CPU uses too."""
    words.view(-1).bitwise_xor_(mask.reshape(-1)[: words.numel()])


def xor_apply_triton(words: torch.Tensor, mask: torch.Tensor) -> None:
    """On a GPU."""
    chosen = settings("xor_apply")
    if words.numel():
        _xor_kernel[(-(-words.numel() // chosen["BLOCK"]),)](words, mask.contiguous(), words.numel(), **chosen)


@triton.jit
def _xor_kernel(words, mask, num_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_words
    flips = tl.load(mask + at, mask=inside, other=0)
    before = tl.load(words + at, mask=inside, other=0)
    tl.store(words + at, before ^ flips, mask=inside)


_xor_apply = operation(
    "xor_apply(Tensor(a!) words, Tensor mask) -> ()",
    cpu=xor_apply_reference,
    cuda=xor_apply_triton,
    fake=lambda words, mask: None,
)

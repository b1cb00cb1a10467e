"""Signs of dense values to packed words.

Worked example: [[+1, -2, -0.5, 3, 0, -0.0, -7, nan]] packs as bits 0 1 1 0 0 0 1 0 (column 0 first), word 70: only what
is less than 0 sets its bit.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import block_of_plane
from mbdist_kernels.launch import grid, settings
from mbdist_kernels.layout import WORD_BITS, words_per_row
from mbdist_kernels.registration import operation

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_signs(
    values: torch.Tensor,  # (m, n) any real dtype; only the sign is read, and 0 (of either sign) packs as +1
) -> torch.Tensor:
    """Pack the signs of ``values`` into words: int32 (m, W) on the same device."""
    return _pack_signs(values)


def pack_signs_cpu(values: torch.Tensor) -> torch.Tensor:
    """By the accelerator, or by numpy, which packs eight bits at a time."""
    if values.dtype in (torch.float32, torch.bfloat16) and native.serves(values):
        return native.pack_signs(values)
    m, n = values.shape
    padded = np.zeros((m, words_per_row(n) * WORD_BITS), dtype=bool)
    padded[:, :n] = (values < 0).numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def pack_signs_reference(values: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    m, n = values.shape
    bits = torch.zeros(m, words_per_row(n) * WORD_BITS, dtype=torch.int32, device=values.device)
    bits[:, :n] = values < 0
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=values.device)
    # Disjoint bits: a wrapping sum is an or, and bit 31 lands in the sign of the int32 as it must.
    return (bits.view(m, -1, WORD_BITS) << shifts).sum(-1, dtype=torch.int32)


def pack_signs_triton(values: torch.Tensor) -> torch.Tensor:
    """On a GPU."""
    if not values.is_floating_point():
        values = values.float()
    infinity = torch.tensor(torch.inf, dtype=values.dtype)
    integers = values.contiguous().view(_INTEGER_OF_SIZE[values.element_size()])
    (m, n), width = values.shape, words_per_row(values.shape[1])
    words = torch.empty(m, width, dtype=torch.int32, device=values.device)
    chosen = settings("pack")
    if words.numel():
        _pack_kernel[grid(m, width, chosen)](
            integers,
            words,
            m,
            n,
            width,
            INFINITY=infinity.view(integers.dtype).item(),
            MAGNITUDE=torch.iinfo(integers.dtype).max,
            **chosen,
        )
    return words


@triton.jit
def _pack_kernel(
    values,  # (m, n) floats as integers
    words,  # (m, W)
    num_rows,
    num_columns,
    row_words,
    INFINITY: tl.constexpr,  # its bits
    MAGNITUDE: tl.constexpr,  # all bits but the sign
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row, column, in_rows, word_at, in_words = block_of_plane(num_rows, row_words, BLOCK_ROWS, BLOCK_WORDS)
    inside = in_rows[:, None, None] & (column < num_columns)[None]
    value = tl.load(values + row[:, None, None] * num_columns + column[None], mask=inside, other=0)
    size = value & MAGNITUDE  # -0.0 and NaN are not less than 0
    negative = ((value < 0) & (size > 0) & (size <= INFINITY)).to(tl.int32)
    packed = tl.sum(negative << tl.arange(0, 32)[None, None, :], axis=2)  # disjoint bits: the sum is an or
    tl.store(words + word_at, packed, mask=in_words)


_pack_signs = operation(
    "pack_signs(Tensor values) -> Tensor",
    cpu=pack_signs_cpu,
    cuda=pack_signs_triton,
    fake=lambda values: values.new_empty(values.shape[0], words_per_row(values.shape[1]), dtype=torch.int32),
)

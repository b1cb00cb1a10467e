"""Packed words to the signs +1 and -1, or to their bits.

Worked example: word 70 and 8 columns unpack to +1 -1 -1 +1 +1 +1 -1 +1.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from mbdist_kernels.bits import block_of_plane
from mbdist_kernels.launch import grid, settings
from mbdist_kernels.layout import WORD_BITS
from mbdist_kernels.registration import operation


def unpack_signs(
    words: torch.Tensor,  # (m, W) int32
    num_columns: int,  # n
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Unpack words to +1 / -1 of ``dtype``: (m, n)."""
    return _unpack_signs(words, num_columns, dtype)


def unpack_bits(
    words: torch.Tensor,  # (m, W) int32
) -> torch.Tensor:
    """The bits of every word in column order: bool (m, 32 W), True where the sign is -1; padding included."""
    return _unpack_bits(words)


def bits_at(
    words: torch.Tensor,  # (W,) int32
    elements: torch.Tensor,  # (C,) integers: element e is bit e % 32 of word e // 32
) -> torch.Tensor:
    """The bits of a few elements: int32 (C,)."""
    return (words[elements.long() // WORD_BITS] >> (elements % WORD_BITS).int()) & 1


@functools.cache
def _byte_to_signs(dtype: torch.dtype) -> torch.Tensor:
    """Table (256, 8): row b holds the eight signs packed in byte b."""
    signbits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(1.0 - 2.0 * signbits).to(dtype)


def unpack_signs_cpu(words: torch.Tensor, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """One table row a byte: several times faster on a CPU than shifting out single bits."""
    as_bytes = torch.from_numpy(np.ascontiguousarray(words.detach().numpy()).view(np.uint8))
    signs = torch.nn.functional.embedding(as_bytes.int(), _byte_to_signs(dtype))
    return signs.view(len(words), -1)[:, :num_columns].contiguous()


def unpack_bits_cpu(words: torch.Tensor) -> torch.Tensor:
    """By numpy."""
    as_bytes = np.ascontiguousarray(words.detach().numpy()).view(np.uint8)
    return torch.from_numpy(np.unpackbits(as_bytes, axis=-1, bitorder="little").view(bool))


def unpack_signs_reference(words: torch.Tensor, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """In plain torch."""
    return (1 - 2 * unpack_bits_reference(words)[:, :num_columns].to(torch.int8)).to(dtype)


def unpack_bits_reference(words: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()


def unpack_signs_triton(words: torch.Tensor, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """On a GPU."""
    return _launch(words, torch.empty(len(words), num_columns, dtype=dtype, device=words.device), bits=False)


def unpack_bits_triton(words: torch.Tensor) -> torch.Tensor:
    """On a GPU."""
    shape = (len(words), words.shape[1] * WORD_BITS)
    return _launch(words, torch.empty(shape, dtype=torch.int8, device=words.device), bits=True).view(torch.bool)


def _launch(words: torch.Tensor, out: torch.Tensor, bits: bool) -> torch.Tensor:
    words = words.contiguous()
    chosen = settings("unpack")
    if out.numel():
        rows, width = words.shape
        _unpack_kernel[grid(rows, width, chosen)](words, out, rows, width, out.shape[1], BITS=bits, **chosen)
    return out


@triton.jit
def _unpack_kernel(
    words,  # (m, W)
    out,  # (m, n)
    num_rows,
    row_words,
    num_columns,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row, column, in_rows, word_at, in_words = block_of_plane(num_rows, row_words, BLOCK_ROWS, BLOCK_WORDS)
    packed = tl.load(words + word_at, mask=in_words, other=0)
    bit = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    value = bit if BITS else 1 - 2 * bit
    inside = in_rows[:, None, None] & (column < num_columns)[None]
    target = out + row[:, None, None] * num_columns + column[None]
    tl.store(target, value.to(tl.float32).to(out.dtype.element_ty), mask=inside)  # exact in every dtype


_unpack_signs = operation(
    "unpack_signs(Tensor words, int num_columns, ScalarType dtype) -> Tensor",
    cpu=unpack_signs_cpu,
    cuda=unpack_signs_triton,
    fake=lambda words, num_columns, dtype: words.new_empty(words.shape[0], num_columns, dtype=dtype),
)
_unpack_bits = operation(
    "unpack_bits(Tensor words) -> Tensor",
    cpu=unpack_bits_cpu,
    cuda=unpack_bits_triton,
    fake=lambda words: words.new_empty(words.shape[0], words.shape[1] * WORD_BITS, dtype=torch.bool),
)

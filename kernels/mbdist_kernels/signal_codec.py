"""The Boolean signal as it crosses a slow link: one sign a weight and one magnitude a row.

    encode      words = signs of the row, magnitude = mean |signal| of the row
    accumulate  total += sum_r weight_r * magnitude_r,i * B_r,ij                     over R ranks, in their order

The mean of absolute values is the scale that makes the signs the nearest in squares (SVID of a single row; arXiv
2402.11295). Worked example: the row (3, -1, 0, -2) has the word 0b1010 and the magnitude 1.5, which is decoded to
1.5 -1.5 1.5 -1.5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import block_of, block_of_plane, signed
from mbdist_kernels.launch import blocks, grid, settings
from mbdist_kernels.layout import words_per_row
from mbdist_kernels.pack import pack_signs, pack_signs_reference
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_signs, unpack_signs_reference


def signal_encode(
    signal: torch.Tensor,  # (m, n) fp32
    counts: torch.Tensor | None = None,  # (m,): values that a row's mean is of, the others being 0; None: n
) -> tuple[torch.Tensor, torch.Tensor]:
    """(words (m, W) int32, magnitudes (m,) fp32). A row that is not finite has such a magnitude, others do not."""
    words, sums = _encode(signal)
    return words, sums / (signal.shape[1] if counts is None else counts)


def encode_reference(signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain torch: (words, sums of magnitudes)."""
    return pack_signs_reference(signal), signal.abs().sum(1)


def encode_cpu(signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By the accelerator, in one pass."""
    if not native.serves(signal):
        return pack_signs(signal), signal.abs().sum(1)
    sums = torch.empty(len(signal))
    return native.pack_signs(signal, sums), sums


def encode_triton(signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On a GPU, in one pass; the sums of its blocks are added up in a fixed order."""
    (m, n), width = signal.shape, words_per_row(signal.shape[1])
    chosen = settings("signal_encode")
    _, across = blocks(m, width, chosen)
    words = torch.empty(m, width, dtype=torch.int32, device=signal.device)
    parts = torch.empty(across, m, device=signal.device)
    if words.numel():
        _encode_kernel[grid(m, width, chosen)](signal.contiguous(), words, parts, m, n, width, **chosen)
    return words, parts.sum(0)


@triton.jit
def _encode_kernel(
    signal,  # (m, n)
    words,  # (m, W)
    parts,  # (column blocks, m)
    num_rows,
    num_columns,
    row_words,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    _, word_block, _ = block_of(row_words, BLOCK_WORDS)
    row, column, in_rows, word_at, in_words = block_of_plane(num_rows, row_words, BLOCK_ROWS, BLOCK_WORDS)
    inside = in_rows[:, None, None] & (column < num_columns)[None]
    value = tl.load(signal + row[:, None, None] * num_columns + column[None], mask=inside, other=0.0)
    packed = tl.sum((value < 0).to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)  # disjoint bits: the sum is an or
    tl.store(words + word_at, packed, mask=in_words)
    tl.store(parts + word_block * num_rows + row, tl.sum(tl.sum(tl.abs(value), 2), 1), mask=in_rows)


_encode = operation(
    "signal_encode(Tensor signal) -> (Tensor, Tensor)",
    cpu=encode_cpu,
    cuda=encode_triton,
    fake=lambda signal: (
        signal.new_empty(signal.shape[0], words_per_row(signal.shape[1]), dtype=torch.int32),
        signal.new_empty(signal.shape[0]),
    ),
)


def signal_accumulate(
    total: torch.Tensor,  # (m, n) fp32, changed in place
    words: torch.Tensor,  # (R, m, W) int32
    magnitudes: torch.Tensor,  # (R, m) fp32, times the weight of each rank
) -> None:
    """Add what R ranks sent, rank 0 first: a fixed order, so the sum is the same wherever it is taken. Raises
    ValueError where the total is not contiguous."""
    torch._check_value(total.is_contiguous(), lambda: "signal_accumulate adds to contiguous memory")
    _accumulate(total, words, magnitudes)


def accumulate_reference(total: torch.Tensor, words: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """In plain torch."""
    for packed, sizes in zip(words, magnitudes, strict=True):
        total += unpack_signs_reference(packed, total.shape[1], total.dtype) * sizes[:, None]


def accumulate_cpu(total: torch.Tensor, words: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """With table lookups for signs."""
    for packed, sizes in zip(words, magnitudes, strict=True):
        total += unpack_signs(packed, total.shape[1], total.dtype) * sizes[:, None]


def accumulate_triton(total: torch.Tensor, words: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """On a GPU, one pass over the total for all ranks."""
    (m, n), width = total.shape, words.shape[2]
    chosen = settings("signal_accumulate")
    if total.numel():
        _accumulate_kernel[grid(m, width, chosen)](
            total,
            words.contiguous(),
            magnitudes.contiguous(),
            m,
            n,
            width,
            RANKS=len(words),
            enable_fp_fusion=False,
            **chosen,
        )


@triton.jit
def _accumulate_kernel(
    total,
    words,
    magnitudes,
    num_rows,
    num_columns,
    row_words,
    RANKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row, column, in_rows, word_at, in_words = block_of_plane(num_rows, row_words, BLOCK_ROWS, BLOCK_WORDS)
    shift = tl.arange(0, 32)
    inside = in_rows[:, None, None] & (column < num_columns)[None]
    target = total + row[:, None, None] * num_columns + column[None]
    sums = tl.load(target, mask=inside, other=0.0)
    for r in tl.static_range(RANKS):
        of_rank = words + tl.cast(r * row_words, tl.int64) * num_rows
        packed = tl.load(of_rank + word_at, mask=in_words, other=0)
        size = tl.load(magnitudes + r * num_rows + row, mask=in_rows, other=0.0)
        sums += signed(size[:, None, None], packed[:, :, None], shift[None, None, :])
    tl.store(target, sums, mask=inside)


_accumulate = operation(
    "signal_accumulate(Tensor(a!) total, Tensor words, Tensor magnitudes) -> ()",
    cpu=accumulate_cpu,
    cuda=accumulate_triton,
    fake=lambda total, words, magnitudes: None,
)

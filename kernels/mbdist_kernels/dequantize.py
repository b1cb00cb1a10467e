"""W_hat = sum_k B_k * outer(s_out_k, s_in_k): packed planes and scales to a dense matrix, in one pass.

The sum over planes is taken in fp32 in the order k = 0, 1, ... without fused multiply-add and rounded once, so the CPU
accelerator, the torch version and the kernel give the same bits.

Worked example: one row with planes +1 -1 and +1 +1, s_out = 2, 1 and s_in = (1, 3), (0.5, 0.5) is
2 * (1, -3) + (0.5, 0.5) = (2.5, -5.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import as_bits, bits_of_float, block_of_plane, signed
from mbdist_kernels.launch import grid, settings
from mbdist_kernels.registration import operation
from mbdist_kernels.scratch import reused_scratch
from mbdist_kernels.unpack import unpack_signs

_CHUNK_ELEMENTS = 1 << 22  # rows unpacked at a time where no accelerator serves: bounds the temporaries


def dequantize(
    planes: Sequence[torch.Tensor],  # K tensors (m, W) int32
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    out: torch.Tensor | None = None,  # (m, n) fp32 or bf16, contiguous
    dtype: torch.dtype = torch.float32,  # where no ``out`` is given
) -> torch.Tensor:
    """Dense W_hat (m, n) in ``out``, or a new tensor. Raises ValueError where ``out`` is not contiguous."""
    torch._check_value(out is None or out.is_contiguous(), lambda: "dequantize writes to contiguous memory")
    if out is None:
        out = torch.empty(scale_out.shape[1], scale_in.shape[1], dtype=dtype, device=scale_out.device)
    _dequantize(planes, scale_out, scale_in, out)
    return out


def dense_in_scratch(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Dense W_hat (m, n) in memory that the next such call in this thread writes to."""
    m, n = scale_out.shape[1], scale_in.shape[1]
    return dequantize(planes, scale_out, scale_in, out=reused_scratch(m * n, dtype, scale_out.device).view(m, n))


def dequantize_cpu(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor, out: torch.Tensor
) -> None:
    """By the accelerator, or in chunks of rows."""
    if native.serves(out) and native.takes_scales(scale_out, scale_in):
        native.dequantize(planes, scale_out, scale_in, out)
        return
    m, n = out.shape
    rows_at_a_time = max(1, _CHUNK_ELEMENTS // n)
    for first in range(0, m, rows_at_a_time):
        rows = slice(first, first + rows_at_a_time)
        out[rows] = dequantize_reference([plane[rows] for plane in planes], scale_out[:, rows], scale_in)


def dequantize_reference(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor
) -> torch.Tensor:
    """In plain torch, in the scales' own dtype."""
    n = scale_in.shape[1]
    dense = torch.zeros(scale_out.shape[1], n, dtype=scale_out.dtype, device=scale_out.device)
    for plane, out_k, in_k in zip(planes, scale_out, scale_in, strict=True):
        dense += out_k[:, None] * (unpack_signs(plane, n, scale_in.dtype) * in_k)
    return dense


def dequantize_triton(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor, out: torch.Tensor
) -> None:
    """On a GPU; scales of another dtype than fp32 are cast."""
    (m, n), width = out.shape, planes[0].shape[1]
    chosen = settings("dequantize", len(planes))
    if out.dtype not in (torch.float32, torch.bfloat16):
        out.copy_(dequantize(planes, scale_out, scale_in))
    elif out.numel():
        _dequantize_kernel[grid(m, width, chosen)](
            tuple(plane.contiguous() for plane in planes),
            scale_out.float().contiguous(),
            scale_in.float().contiguous(),
            as_bits(out),
            m,
            n,
            width,
            PLANES=len(planes),
            SIXTEEN=out.dtype == torch.bfloat16,
            enable_fp_fusion=False,
            **chosen,
        )


@triton.jit
def dense_block(
    planes,  # K of (m, W)
    scale_out,  # (K, m)
    scale_in,  # (K, n)
    row,  # (R,)
    column,  # (W, 32)
    word_at,  # (R, W): offsets of the words
    in_words,  # (R, W): which of them exist
    num_rows,
    num_columns,
    PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """A block of W_hat in a kernel: fp32 (R, W, 32)."""
    shift = tl.arange(0, 32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_WORDS, 32), tl.float32)
    for k in tl.static_range(PLANES):
        packed = tl.load(planes[k] + word_at, mask=in_words, other=0)
        of_row = tl.load(scale_out + k * num_rows + row, mask=row < num_rows, other=0.0)
        of_column = tl.load(scale_in + k * num_columns + column, mask=column < num_columns, other=0.0)
        total += of_row[:, None, None] * signed(of_column[None], packed[:, :, None], shift[None, None, :])
    return total


@triton.jit
def _dequantize_kernel(
    planes,  # K of (m, W)
    scale_out,  # (K, m)
    scale_in,  # (K, n)
    out,  # (m, n) as integers
    num_rows,
    num_columns,
    row_words,
    PLANES: tl.constexpr,
    SIXTEEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row, column, in_rows, word_at, in_words = block_of_plane(num_rows, row_words, BLOCK_ROWS, BLOCK_WORDS)
    weight = dense_block(
        planes,
        scale_out,
        scale_in,
        row,
        column,
        word_at,
        in_words,
        num_rows,
        num_columns,
        PLANES,
        BLOCK_ROWS,
        BLOCK_WORDS,
    )
    target = out + row[:, None, None] * num_columns + column[None]
    tl.store(target, bits_of_float(weight, SIXTEEN), mask=in_rows[:, None, None] & (column < num_columns)[None])


_dequantize = operation(
    "dequantize(Tensor[] planes, Tensor scale_out, Tensor scale_in, Tensor(a!) out) -> ()",
    cpu=dequantize_cpu,
    cuda=dequantize_triton,
    fake=lambda planes, scale_out, scale_in, out: None,
)

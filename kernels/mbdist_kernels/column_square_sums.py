"""sum_t v_tj^2 of every column: the diagonal second moments that a curvature is made of, of X and of dY.

Squares of 64 tokens are summed in fp32 and those sums in fp64: one pass, and nothing of the size of the input is made.
Sums are taken block by block in a fixed order, without atomics, so a result repeats bit for bit on a device.

Worked example: the rows (1, 2), (3, -1) have (10, 5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import as_bits, float_of_bits
from mbdist_kernels.launch import settings
from mbdist_kernels.registration import operation


def column_square_sums(
    values: torch.Tensor,  # (T, n) fp32 or bf16
) -> torch.Tensor:
    """fp64 (n,); on a CPU the same bits for any number of threads."""
    return _square_sums(values)


def square_sums_cpu(values: torch.Tensor) -> torch.Tensor:
    """By the accelerator where there is one."""
    return native.column_square_sums(values) if native.serves(values) else square_sums_reference(values)


def square_sums_reference(values: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    return torch.linalg.vector_norm(values, dim=0, dtype=torch.float64).square()


def square_sums_triton(values: torch.Tensor) -> torch.Tensor:
    """On a GPU; values of another dtype are cast."""
    values = values if values.dtype == torch.bfloat16 else values.float()
    tokens, n = values.shape
    chosen = settings("column_square_sums")
    bursts = -(-tokens // chosen["BLOCK_TOKENS"])
    parts = torch.empty(bursts, n, device=values.device)
    if values.numel():
        programs = -(-n // chosen["BLOCK_COLUMNS"]), bursts
        _squares_kernel[programs](as_bits(values.contiguous()), parts, tokens, n, **chosen)
    return parts.sum(0, dtype=torch.float64)


@triton.jit
def _squares_kernel(
    values,  # (T, n) as integers
    parts,  # (blocks of tokens, n)
    num_tokens,
    num_columns,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    burst = tl.program_id(1).to(tl.int64)
    token = burst * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = column < num_columns
    inside = (token < num_tokens)[:, None] & in_columns[None, :]
    value = float_of_bits(tl.load(values + token[:, None] * num_columns + column[None, :], mask=inside, other=0))
    tl.store(parts + burst * num_columns + column, tl.sum(value * value, 0), mask=in_columns)


_square_sums = operation(
    "column_square_sums(Tensor values) -> Tensor",
    cpu=square_sums_cpu,
    cuda=square_sums_triton,
    fake=lambda values: values.new_empty(values.shape[1], dtype=torch.float64),
)

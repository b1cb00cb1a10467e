"""y = x W_hat^T for a few tokens, straight from packed words: the weight is never dense.

    y_t,i = sum_k s_out_k,i  sum_j B_k,ij (s_in_k,j x_t,j)                        (arXiv 2505.22811, eq. 4)

At one token a linear layer is bound by reading its weight, and K bits are read here in place of 16. Matrices that take
the same x (queries, keys and values; gate and up) share a launch: a small one alone is all latency. On a GPU the signs
become bf16 +-1 in registers, as the left operand of a tensor-core product whose right operand is s_in_k * x in bf16.
Its columns are permuted so that a thread's registers are whole words: column ``32 q + j + 16 e`` of a block of 128 is
at place ``8 j + 2 q + e``, so word q shifted by 15 - j holds the bf16 signs of places 8 j + 2 q and 8 j + 2 q + 1. On a
CPU the sum over the columns with a set bit is taken, in fp32: sum_j B x = sum_j x - 2 sum_{bit 1} x.

Worked example: B = +1 -1, s_out = 2, s_in = (1, 3), x = (5, 1): y = 2 * (5 - 3) = 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import as_bits, bits_of_float, float_of_bits, ones_with_signs, product
from mbdist_kernels.launch import settings
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_signs

MOST_TOKENS = 16
_BLOCK = 128  # columns that are permuted among themselves
_MEASURED_ROWS = 8192  # of the matrix that ``mbdist tune`` takes


def linear_decode(
    x: torch.Tensor,  # (T, n) fp32 or bf16, T <= 16
    planes: Sequence[torch.Tensor],  # K tensors (m, W) int32
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
) -> torch.Tensor:
    """y (T, m) of x's dtype; sums are taken in fp32. A token that is not finite stays with itself. Raises ValueError
    for more tokens."""
    return linear_decode_together(x, [(planes, scale_out, scale_in)])[0]


def linear_decode_together(
    x: torch.Tensor,  # (T, n) fp32 or bf16, T <= 16
    weights: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor]],  # as ``linear_decode`` takes them
) -> tuple[torch.Tensor, ...]:
    """One y (T, m) a weight, by one launch; on a CPU in every bit what ``linear_decode`` gives. Raises ValueError for
    more tokens, and where the weights have not the same number of planes."""
    if len(x) > MOST_TOKENS:
        raise ValueError(f"linear_decode takes up to {MOST_TOKENS} tokens, not {len(x)}")
    planes, scales_out, scales_in = zip(*weights, strict=True)
    if len(counts := {len(of_weight) for of_weight in planes}) > 1:
        raise ValueError(f"weights that are decoded together have the same number of planes, not {sorted(counts)}")
    y = _linear_decode(x, [plane for of_weight in planes for plane in of_weight], scales_out, scales_in)
    return y.split([scale.shape[1] for scale in scales_out], dim=1) if len(weights) > 1 else (y,)


def linear_decode_cpu(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],  # those of the first weight, then of the second, ...
    scales_out: Sequence[torch.Tensor],
    scales_in: Sequence[torch.Tensor],
) -> torch.Tensor:
    """By the accelerator, or in plain torch. y (T, m) of all weights side by side."""
    count, x, dtype = len(planes) // len(scales_out), x.float(), x.dtype
    weights = [
        (planes[w * count : (w + 1) * count], scale_out.float(), scale_in.float())
        for w, (scale_out, scale_in) in enumerate(zip(scales_out, scales_in, strict=True))
    ]
    if native.serves(x):
        return native.linear_decode(x, weights).to(dtype)
    return torch.cat([linear_decode_reference(x, *weight) for weight in weights], dim=1).to(dtype)


def linear_decode_reference(
    x: torch.Tensor, planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor
) -> torch.Tensor:
    """One weight in plain torch, in x's dtype."""
    y = x.new_zeros(len(x), scale_out.shape[1])
    for plane, out_k, in_k in zip(planes, scale_out, scale_in, strict=True):
        y += ((x * in_k) @ unpack_signs(plane, x.shape[1], x.dtype).T) * out_k
    return y


def linear_decode_triton(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales_out: Sequence[torch.Tensor],
    scales_in: Sequence[torch.Tensor],
) -> torch.Tensor:
    """On a GPU."""
    (tokens, n), width = x.shape, planes[0].shape[1]
    rows, count, num_blocks = [scale.shape[1] for scale in scales_out], len(planes) // len(scales_out), -(-n // _BLOCK)
    chosen = settings("linear_decode", count)
    chosen = chosen | {"SPLIT": _split(sum(rows), num_blocks, chosen)}
    step = chosen["BLOCKS_AT_A_TIME"] * chosen["SPLIT"]
    padded = -(-num_blocks // step) * step * _BLOCK
    inputs = torch.empty(len(planes), MOST_TOKENS, padded, dtype=torch.int16, device=x.device)
    y = torch.empty(tokens, sum(rows), dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32, device=x.device)
    parts = y if chosen["SPLIT"] == 1 else y.new_empty(chosen["SPLIT"], *y.shape, dtype=torch.float32)
    x, dtype = x if x.dtype == torch.bfloat16 else x.float(), x.dtype
    _permute_kernel[len(planes), MOST_TOKENS, padded // _BLOCK](
        as_bits(x.contiguous()),
        tuple(scale.float().contiguous() for scale in scales_in),
        inputs,
        tokens,
        n,
        padded,
        PLANES=count,
        WEIGHTS=len(rows),
        BLOCK=_BLOCK,
    )
    _decode_kernel[sum(-(-m // chosen["BLOCK_ROWS"]) for m in rows), chosen["SPLIT"]](
        tuple(plane.contiguous() for plane in planes),
        tuple(scale.float().contiguous() for scale in scales_out),
        inputs.view(torch.bfloat16),
        as_bits(parts),
        tokens,
        tuple(rows),
        width,
        padded,
        padded // 32 // chosen["SPLIT"],
        PLANES=count,
        WEIGHTS=len(rows),
        SIXTEEN=parts.dtype == torch.bfloat16,
        enable_fp_fusion=True,
        **chosen,
    )
    return (y if parts is y else parts.sum(0)).to(dtype)


def _split(num_rows: int, num_blocks: int, chosen: dict) -> int:
    """Into how many programs a row is cut: with few rows (keys and values of grouped heads) into more, up to the number
    of programs that the matrix has on which settings are measured."""
    most = max(1, num_blocks // chosen["BLOCKS_AT_A_TIME"])
    return max(chosen["SPLIT"], min(most, _MEASURED_ROWS // max(num_rows, 1), 8))


@triton.jit
def _permute_kernel(
    x,  # (T, n) as integers
    scales_in,  # of each weight (K, n)
    inputs,  # (weights * K, 16, padded) bf16 as int16
    num_tokens,
    num_columns,
    padded,
    PLANES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    plane, token, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    scale_in = scales_in[0]
    for other in tl.static_range(1, WEIGHTS):
        scale_in = tl.where(plane // PLANES == other, scales_in[other], scale_in)
    place = tl.arange(0, BLOCK)
    column = block * BLOCK + (place // 2 % 4) * 32 + place // 8 + place % 2 * 16
    inside = column < tl.where(token < num_tokens, num_columns, 0)
    value = float_of_bits(tl.load(x + token * num_columns + column, mask=inside, other=0))
    scale = tl.load(scale_in + plane % PLANES * num_columns + column, mask=inside, other=0.0)
    target = inputs + (plane * tl.num_programs(1) + token).to(tl.int64) * padded + block * BLOCK + place
    tl.store(target, bits_of_float(tl.where(inside, value * scale, 0.0), True))


@triton.jit
def _decode_kernel(
    planes,  # weights * K of (m, W)
    scales_out,  # of each weight (K, m)
    inputs,  # (weights * K, 16, padded) bf16, permuted
    parts,  # (SPLIT, T, sum of m) as integers
    num_tokens,
    rows,  # of each weight
    row_words,
    padded,
    split_words,  # words of a row that a program goes through
    PLANES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SIXTEEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS_AT_A_TIME: tl.constexpr,
    SPLIT: tl.constexpr,
):
    WORDS: tl.constexpr = 4 * BLOCKS_AT_A_TIME
    # Whose block of rows this is.
    weight, block, first_row, total_rows = 0, tl.program_id(0), 0, rows[0]
    num_rows, scale_out, first_block = rows[0], scales_out[0], 0
    for other in tl.static_range(1, WEIGHTS):
        first_block += tl.cdiv(rows[other - 1], BLOCK_ROWS)
        reached = tl.program_id(0) >= first_block
        weight = tl.where(reached, other, weight)
        block = tl.where(reached, tl.program_id(0) - first_block, block)
        first_row = tl.where(reached, total_rows, first_row)
        num_rows = tl.where(reached, rows[other], num_rows)
        scale_out = tl.where(reached, scales_out[other], scale_out)
        total_rows += rows[other]
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < num_rows
    token = tl.arange(0, 16)
    place = tl.arange(0, 32 * WORDS)
    first = tl.program_id(1) * split_words
    total = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for k in range(PLANES):  # not unrolled: the addresses of all planes' loads at once would not fit the registers
        plane = planes[0]
        for other in tl.static_range(1, WEIGHTS * PLANES):
            plane = tl.where(weight * PLANES + k == other, planes[other], plane)
        of_plane = inputs + (weight * PLANES + k) * 16 * padded
        sums = tl.zeros((BLOCK_ROWS, 16), tl.float32)
        for start in range(first, first + split_words, WORDS):
            word = start + tl.arange(0, WORDS)
            inside = in_rows[:, None] & (word < row_words)[None, :]
            packed = tl.load(
                plane + row[:, None] * row_words + word[None, :],
                mask=inside,
                other=0,
                eviction_policy="evict_first",
            )
            value = tl.load(of_plane + token[None, :] * padded + start * 32 + place[:, None])  # (columns, 16)
            j = tl.arange(0, 16)
            pair = packed.reshape(BLOCK_ROWS, BLOCKS_AT_A_TIME, 1, 4) << (15 - j)[None, None, :, None]
            pair = ones_with_signs(pair)
            low, high = (pair & 0xFFFF).to(tl.int16), (pair >> 16).to(tl.int16)
            signs = tl.join(low, high).reshape(BLOCK_ROWS, 32 * WORDS)
            sums = product(signs, value, sums)
        total += tl.load(scale_out + k * num_rows + row, mask=in_rows, other=0.0)[:, None] * sums
    target = parts + (tl.program_id(1) * num_tokens + token)[None, :] * total_rows + (first_row + row)[:, None]
    tl.store(target, bits_of_float(total, SIXTEEN), mask=in_rows[:, None] & (token < num_tokens)[None, :])


_linear_decode = operation(
    "linear_decode(Tensor x, Tensor[] planes, Tensor[] scales_out, Tensor[] scales_in) -> Tensor",
    cpu=linear_decode_cpu,
    cuda=linear_decode_triton,
    fake=lambda x, planes, scales_out, scales_in: x.new_empty(len(x), sum(scale.shape[1] for scale in scales_out)),
)

"""y = x W_hat^T + b: the product of a multi-Boolean layer, by the cheapest of three ways for the number of tokens.

Few tokens (up to 16) take ``linear_decode``. Many take a dense weight in scratch memory and the library's product: the
dense pass costs a fixed time, the product grows with the tokens. In between, on a GPU, a kernel makes tiles of the
weight on its way to the tensor cores. From how many tokens on the dense pass pays is measured for a kind of device and
a number of planes (``mbdist tune``); ``launch.rule`` says what it is without a measurement.

Worked example: B = +1 -1, s_out = 2, s_in = (1, 3), x = (5, 1), b = 1: W_hat = (2, -6) and y = 10 - 6 + 1 = 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import as_bits, bits_of_float, product, words_at
from mbdist_kernels.dequantize import dense_block, dense_in_scratch, dequantize_reference
from mbdist_kernels.launch import settings
from mbdist_kernels.linear_decode import MOST_TOKENS, linear_decode
from mbdist_kernels.registration import operation


def linear_forward(
    x: torch.Tensor,  # (T, n) fp32 or bf16
    planes: Sequence[torch.Tensor],  # K tensors (m, W) int32
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    bias: torch.Tensor | None = None,  # (m,)
) -> torch.Tensor:
    """y (T, m) of x's dtype. The weight is rounded to that dtype, except by ``linear_decode``."""
    return _linear_forward(x, planes, scale_out, scale_in, bias)


def decodes(num_tokens: int, dtype: torch.dtype, device: torch.device, num_planes: int) -> bool:
    """Whether ``linear_forward`` of so many tokens is ``linear_decode``, straight from packed words."""
    return (_decodes_on_cpu if device.type == "cpu" else _decodes_on_gpu)(num_tokens, dtype, num_planes)


def _decodes_on_cpu(num_tokens: int, _dtype: torch.dtype, num_planes: int) -> bool:
    """Not without the accelerator, whose sums over packed words are what pays."""
    packed_below = min(settings("dense_from_cpu", num_planes)["tokens"], MOST_TOKENS + 1)
    return 0 < num_tokens < packed_below and native.accelerator() is not None


def _decodes_on_gpu(num_tokens: int, dtype: torch.dtype, num_planes: int) -> bool:
    """In bf16 alone, in which the kernel multiplies."""
    packed_below = min(settings("dense_from", num_planes)["tokens"], MOST_TOKENS + 1)
    return dtype == torch.bfloat16 and 0 < num_tokens < packed_below


def linear_forward_reference(x, planes, scale_out, scale_in, bias):
    """In plain torch, the weight dense in x's dtype."""
    y = x @ dequantize_reference(planes, scale_out, scale_in).to(x.dtype).T
    return y if bias is None else y + bias.to(y.dtype)


def linear_forward_cpu(x, planes, scale_out, scale_in, bias):
    """Packed or dense."""
    if _decodes_on_cpu(len(x), x.dtype, len(planes)):
        return _add_bias(linear_decode(x, planes, scale_out, scale_in), bias)
    return linear_by_dense_weight(x, planes, scale_out, scale_in, bias)


def linear_forward_triton(x, planes, scale_out, scale_in, bias):
    """Packed, in tiles or dense; dense alone where x is not in bf16, in which the two others multiply."""
    if _decodes_on_gpu(len(x), x.dtype, len(planes)):
        return _add_bias(linear_decode(x, planes, scale_out, scale_in), bias)
    if x.dtype != torch.bfloat16 or not 0 < len(x) < settings("dense_from", len(planes))["tokens"]:
        return linear_by_dense_weight(x, planes, scale_out, scale_in, bias)
    return _add_bias(linear_in_tiles_triton(x, planes, scale_out, scale_in), bias)


def linear_by_dense_weight(x, planes, scale_out, scale_in, bias):
    """The weight in scratch memory, in x's dtype, and the library's product."""
    weight = dense_in_scratch(planes, scale_out, scale_in, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _add_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def linear_in_tiles_triton(
    x: torch.Tensor, planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor
) -> torch.Tensor:
    """On a GPU, x in bf16: the weight exists in tiles alone, a block of columns at a time."""
    (tokens, n), m, width = x.shape, scale_out.shape[1], planes[0].shape[1]
    chosen = settings("linear_in_tiles", len(planes))
    y = torch.empty(tokens, m, dtype=x.dtype, device=x.device)
    _tiles_kernel[-(-m // chosen["BLOCK_ROWS"]), -(-tokens // chosen["BLOCK_TOKENS"])](
        x.contiguous(),
        tuple(plane.contiguous() for plane in planes),
        scale_out.float().contiguous(),
        scale_in.float().contiguous(),
        as_bits(y),
        tokens,
        m,
        n,
        width,
        PLANES=len(planes),
        enable_fp_fusion=True,
        **chosen,
    )
    return y


@triton.jit
def _tiles_kernel(
    x,  # (T, n) bf16
    planes,  # K of (m, W)
    scale_out,  # (K, m)
    scale_in,  # (K, n)
    y,  # (T, m) bf16 as int16
    num_tokens,
    num_rows,
    num_columns,
    row_words,
    PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_rows, in_tokens = row < num_rows, token < num_tokens
    place = tl.arange(0, 32 * BLOCK_WORDS)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for first in range(0, row_words, BLOCK_WORDS):
        word = first + tl.arange(0, BLOCK_WORDS)
        column, _, word_at, in_words = words_at(row, word, num_rows, row_words)
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
        rounded = bits_of_float(weight.reshape(BLOCK_ROWS, 32 * BLOCK_WORDS), True)
        column = first * 32 + place
        inside = in_tokens[None, :] & (column < num_columns)[:, None]
        value = tl.load(x + token[None, :] * num_columns + column[:, None], mask=inside, other=0.0)  # (columns, tokens)
        sums = product(rounded, value, sums)
    target = y + token[None, :] * num_rows + row[:, None]
    tl.store(target, bits_of_float(sums, True), mask=in_rows[:, None] & in_tokens[None, :])


_linear_forward = operation(
    "linear_forward(Tensor x, Tensor[] planes, Tensor scale_out, Tensor scale_in, Tensor? bias) -> Tensor",
    cpu=linear_forward_cpu,
    cuda=linear_forward_triton,
    fake=lambda x, planes, scale_out, scale_in, bias: x.new_empty(x.shape[0], scale_out.shape[1]),
)

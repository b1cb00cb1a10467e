"""Backward of a multi-Boolean linear layer: dX, and of the weight gradient G what the method keeps.

With G = dL/dW_hat = dY^T X (m x n), summed over tokens (arXiv 2505.22811, section 4):

    dL/ds_out_k = (G * B_k) s_in_k          dL/ds_in_k = (G * B_k)^T s_out_k          for every plane k
    signal      = G * outer(row_factor, column_factor)                                 for every accumulator

``row_factor = s_out_t, column_factor = s_in_t`` gives the Boolean variation signal q = dL/dB_t of the paper; the
curvature-normalised signal q / (s^2 h) is another choice of the same two vectors, because s and h are rank-1.

G of a whole matrix is never in memory: the library's product writes a chunk of its rows into a reused buffer that
stays in a GPU's L2, and one streaming pass turns the chunk into scale gradients and signals. Sums are taken block by
block in a fixed order, without atomics, so a result repeats bit for bit on a device.

Worked example of the pass, K = 1: G = (2, -1), B = +1 -1, s_out = 3, s_in = (1, 4) give dL/ds_out = 2 * 1 + 1 * 4 = 6
and dL/ds_in = (6, 3); with factors 1 the signal is G, its sign word 0b10, its magnitude (mean of |signal|) 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import as_bits, block_of, block_of_plane, float_of_bits, signed
from mbdist_kernels.dequantize import dense_in_scratch
from mbdist_kernels.launch import blocks, settings
from mbdist_kernels.layout import WORD_BITS, words_per_row
from mbdist_kernels.pack import pack_signs
from mbdist_kernels.registration import operation
from mbdist_kernels.scratch import reused_scratch
from mbdist_kernels.unpack import unpack_signs

_TILE_ROWS = 128  # of the library's product: a chunk of a part of a tile would waste the rest
_CHUNK_BYTES = 16 << 20  # rows of G computed at a time: stays in a GPU's L2, bounded for any matrix


@dataclass
class Signal:
    """What is wanted of a weight gradient G: ``G * outer(row_factor, column_factor)``, to be written, as it is or as
    signs and one magnitude a row."""

    row_factor: torch.Tensor  # (m,) fp32
    column_factor: torch.Tensor  # (n,) fp32
    values: torch.Tensor | None = None  # (m, 32 W) fp32; padding columns get 0
    words: torch.Tensor | None = None  # (m, W) int32, in place of values: the signs
    magnitudes: torch.Tensor | None = None  # (m,) fp32, with words: mean of the row's absolute values

    def rows(self, rows: slice) -> Signal:
        """That of some rows of G, the same memory."""
        wanted = (None if t is None else t[rows] for t in (self.values, self.words, self.magnitudes))
        return Signal(self.row_factor[rows], self.column_factor, *wanted)


def linear_backward_input(
    dy: torch.Tensor,  # (T, m) fp32 or bf16
    planes: Sequence[torch.Tensor],  # K tensors (m, W) int32
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
) -> torch.Tensor:
    """dX = dY W_hat (T, n), the weight dense in scratch memory."""
    return dy @ dense_in_scratch(planes, scale_out, scale_in, dy.dtype)


def linear_backward_weight(
    dy: torch.Tensor,  # (T, m) fp32 or bf16
    x: torch.Tensor,  # (T, n), the same dtype
    planes: Sequence[torch.Tensor],  # K tensors (m, W) int32
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    signals: Sequence[Signal] = (),  # written
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dL/ds_out (K, m), dL/ds_in (K, n)), fp32."""
    m, n = scale_out.shape[1], scale_in.shape[1]
    grad_out = torch.empty(scale_out.shape, device=dy.device)
    grad_in = torch.zeros(scale_in.shape, device=dy.device)
    whole_tiles = _CHUNK_BYTES // (n * dy.element_size()) // _TILE_ROWS * _TILE_ROWS
    rows_at_a_time = max(_TILE_ROWS, whole_tiles)
    buffer = reused_scratch(min(rows_at_a_time, m) * n, dy.dtype, dy.device)
    for first in range(0, m, rows_at_a_time):
        rows = slice(first, min(first + rows_at_a_time, m))
        chunk = buffer[: (rows.stop - first) * n].view(-1, n)
        torch.mm(dy[:, rows].T, x, out=chunk)
        scale_gradients_and_signals(
            chunk,
            [plane[rows] for plane in planes],
            scale_out[:, rows],
            scale_in,
            grad_out[:, rows],
            grad_in,
            [signal.rows(rows) for signal in signals],
        )
    return grad_out, grad_in


def scale_gradients_and_signals(
    gradient: torch.Tensor,  # (rows, n) fp32 or bf16, contiguous: G of these rows
    planes: Sequence[torch.Tensor],  # K tensors (rows, W) int32
    scale_out: torch.Tensor,  # (K, rows) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    grad_scale_out: torch.Tensor,  # (K, rows) fp32, written
    grad_scale_in: torch.Tensor,  # (K, n) fp32, added to
    signals: Sequence[Signal] = (),  # all in one form; written
) -> None:
    """One streaming pass over G. Raises ValueError where signals differ in form or are not contiguous."""
    in_words = {signal.values is None for signal in signals}
    targets = [t for signal in signals for t in (signal.values, signal.words, signal.magnitudes) if t is not None]
    torch._check_value(len(in_words) < 2, lambda: "signals are all values, or all words and magnitudes")
    torch._check_value(all(t.is_contiguous() for t in targets), lambda: "signals are written to contiguous memory")
    _epilogue(
        gradient,
        planes,
        scale_out,
        scale_in,
        grad_scale_out,
        grad_scale_in,
        [signal.row_factor for signal in signals],
        [signal.column_factor for signal in signals],
        [signal.values for signal in signals if signal.values is not None],
        [signal.words for signal in signals if signal.words is not None],
        [signal.magnitudes for signal in signals if signal.magnitudes is not None],
    )


def _epilogue_cpu(
    gradient, planes, scale_out, scale_in, grad_out, grad_in, row_factors, column_factors, values, words, magnitudes
):
    none = [None] * len(row_factors)
    if native.serves(gradient) and native.takes_scales(scale_out, scale_in):
        factors = [[factor.contiguous() for factor in factors] for factors in (row_factors, column_factors)]
        signals = list(zip(*factors, values or none, words or none, magnitudes or none, strict=True))
        native.scale_gradients_and_signals(gradient, planes, scale_out, scale_in, grad_out, grad_in, signals)
        return
    n = scale_in.shape[1]
    if words:
        shape = (len(gradient), words_per_row(n) * WORD_BITS)
        values = [torch.empty(shape, device=gradient.device) for _ in words]
    epilogue_reference(gradient, planes, scale_out, scale_in, grad_out, grad_in, row_factors, column_factors, values)
    if words:
        for signal, signs, sizes in zip(values, words, magnitudes, strict=True):
            signs.copy_(pack_signs(signal))
            sizes.copy_(signal.abs().sum(1) / n)


def epilogue_reference(
    gradient, planes, scale_out, scale_in, grad_out, grad_in, row_factors, column_factors, values
) -> None:
    """In plain torch, signals as values; arguments as in ``scale_gradients_and_signals``."""
    n = scale_in.shape[1]
    dense = gradient.to(scale_out.dtype)
    for k, plane in enumerate(planes):
        signed_gradient = dense * unpack_signs(plane, n, dense.dtype)
        grad_out[k] = signed_gradient @ scale_in[k]
        grad_in[k] += scale_out[k] @ signed_gradient
    for row_factor, column_factor, signal in zip(row_factors, column_factors, values, strict=True):
        signal[:, :n] = dense * row_factor[:, None] * column_factor
        signal[:, n:] = 0


def epilogue_triton(
    gradient, planes, scale_out, scale_in, grad_out, grad_in, row_factors, column_factors, values, words, magnitudes
) -> None:
    """On a GPU. Arguments as in ``scale_gradients_and_signals``."""
    (m, n), width, count = gradient.shape, planes[0].shape[1], len(planes)
    chosen = settings("linear_backward", count)
    down, across = blocks(m, width, chosen)
    device = gradient.device
    out_parts = torch.empty(count, across, m, device=device)
    in_parts = torch.empty(count, down, n, device=device)
    size_parts = torch.empty(len(words), across, m, device=device)
    gradient = gradient if gradient.dtype == torch.bfloat16 else gradient.float()
    _epilogue_kernel[(down * across,)](
        as_bits(gradient.contiguous()),
        tuple(plane.contiguous() for plane in planes),
        scale_out.float().contiguous(),
        scale_in.float().contiguous(),
        out_parts,
        in_parts,
        tuple(factor.contiguous() for factor in row_factors),
        tuple(factor.contiguous() for factor in column_factors),
        tuple(words or values),
        size_parts,
        m,
        n,
        width,
        PLANES=count,
        SIGNALS=len(row_factors),
        AS_WORDS=bool(words),
        enable_fp_fusion=True,  # in sums alone: signals, and so their signs, are products
        **chosen,
    )
    grad_out.copy_(out_parts.sum(1))
    grad_in.add_(in_parts.sum(1))
    for sizes, parts in zip(magnitudes, size_parts, strict=True):
        sizes.copy_(parts.sum(0) / n)


@triton.jit
def _epilogue_kernel(
    gradient,  # (m, n) as integers
    planes,  # K of (m, W)
    scale_out,  # (K, m)
    scale_in,  # (K, n)
    out_parts,  # (K, column blocks, m)
    in_parts,  # (K, row blocks, n)
    row_factors,  # of every signal (m,)
    column_factors,  # of every signal (n,)
    signals,  # of every signal (m, 32 W) fp32, or (m, W) words
    size_parts,  # (signals, column blocks, m)
    num_rows,
    num_columns,
    row_words,
    PLANES: tl.constexpr,
    SIGNALS: tl.constexpr,
    AS_WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row_block, word_block, across = block_of(row_words, BLOCK_WORDS)
    row, column, in_rows, word_at, in_words = block_of_plane(num_rows, row_words, BLOCK_ROWS, BLOCK_WORDS)
    down = tl.cdiv(num_rows, BLOCK_ROWS)
    in_columns = column < num_columns
    shift = tl.arange(0, 32)
    inside = in_rows[:, None, None] & in_columns[None]
    at = row[:, None, None] * num_columns + column[None]
    g = float_of_bits(tl.load(gradient + at, mask=inside, other=0))  # (rows, words, 32)
    for k in tl.static_range(PLANES):
        packed = tl.load(planes[k] + word_at, mask=in_words, other=0)
        of_row = tl.load(scale_out + k * num_rows + row, mask=in_rows, other=0.0)
        of_column = tl.load(scale_in + k * num_columns + column, mask=in_columns, other=0.0)
        with_sign = signed(g, packed[:, :, None], shift[None, None, :])
        out_part = tl.sum(tl.sum(with_sign * of_column[None], 2), 1)
        in_part = tl.sum(with_sign * of_row[:, None, None], 0)
        tl.store(out_parts + (k * across + word_block) * num_rows + row, out_part, mask=in_rows)
        target = in_parts + (k * down + row_block).to(tl.int64) * num_columns + column
        tl.store(target, in_part, mask=in_columns)
    for s in tl.static_range(SIGNALS):
        of_row = tl.load(row_factors[s] + row, mask=in_rows, other=0.0)
        of_column = tl.load(column_factors[s] + column, mask=in_columns, other=0.0)
        # Padding is 0 whatever the factors are, and a row that is not finite stays with itself.
        signal = tl.where(inside, g * of_row[:, None, None] * of_column[None], 0.0)
        if AS_WORDS:
            packed = tl.sum((signal < 0).to(tl.int32) << shift[None, None, :], 2)
            tl.store(signals[s] + word_at, packed, mask=in_words)
            size = tl.sum(tl.sum(tl.abs(signal), 2), 1)
            tl.store(size_parts + (s * across + word_block) * num_rows + row, size, mask=in_rows)
        else:
            target = signals[s] + row[:, None, None] * (row_words * 32) + column[None]
            tl.store(target, signal, mask=in_words[:, :, None])


_epilogue = operation(
    "scale_gradients_and_signals(Tensor gradient, Tensor[] planes, Tensor scale_out, Tensor scale_in, "
    "Tensor(a!) grad_scale_out, Tensor(b!) grad_scale_in, Tensor[] row_factors, Tensor[] column_factors, "
    "Tensor(c!)[] values, Tensor(d!)[] words, Tensor(e!)[] magnitudes) -> ()",
    cpu=_epilogue_cpu,
    cuda=epilogue_triton,
    fake=lambda *arguments: None,
)

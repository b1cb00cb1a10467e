"""From the dense weight gradient of a few rows to what the method keeps of it: scale gradients and the signal.

With G = dL/dW_hat (m x n) of a linear layer (arXiv 2505.22811, section 4):

    dL/ds_out_k = (G * B_k) s_in_k          dL/ds_in_k = (G * B_k)^T s_out_k          for every plane k
    signal      = G * outer(row_factor, column_factor)                                 for every accumulator

``row_factor = s_out_t, column_factor = s_in_t`` gives the Boolean variation signal q = dL/dB_t of the paper; the
curvature-normalised signal q / (s^2 h) is another choice of the same two vectors, because s and h are rank-1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbdist_kernels import native
from mbdist_kernels.layout import unpack_signs, words_per_row


def scale_gradients_and_signals(
    gradient: torch.Tensor,  # (rows, n) fp32 or bf16: G of these rows
    planes: Sequence[torch.Tensor],  # K tensors (rows, W) int32
    scale_out: torch.Tensor,  # (K, rows) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    grad_scale_out: torch.Tensor,  # (K, rows) fp32, written
    grad_scale_in: torch.Tensor,  # (K, n) fp32, added to
    signals: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = (),
) -> None:
    """One streaming pass over G. Each of ``signals`` is (row_factor (rows,), column_factor (n,), signal (rows, 32 W)),
    fp32; the signal is written, 0 in its padding columns."""
    if native.serves(gradient) and native.takes_scales(scale_out, scale_in):
        native.scale_gradients_and_signals(
            gradient, planes, scale_out, scale_in, grad_scale_out, grad_scale_in, signals
        )
        return
    n = scale_in.shape[1]
    dense = gradient.to(scale_out.dtype)
    for k, plane in enumerate(planes):
        signed = dense * unpack_signs(plane, n, dense.dtype)
        grad_scale_out[k] = signed @ scale_in[k]
        grad_scale_in[k] += scale_out[k] @ signed
    for row_factor, column_factor, signal in signals:
        signal[:, :n] = dense * row_factor[:, None] * column_factor
        if n < words_per_row(n) * 32:
            signal[:, n:] = 0


def column_square_sums(
    values: torch.Tensor,  # (T, n) fp32 or bf16
) -> torch.Tensor:
    """sum_t values[t, j]^2 for every column: fp64 (n,), one pass, the same bits for any number of threads."""
    if native.serves(values):
        return native.column_square_sums(values)
    return torch.linalg.vector_norm(values, dim=0, dtype=torch.float64).square()

"""A linear layer whose weight is K packed sign planes and their scales.

    W_hat = sum_k B_k * outer(s_out_k, s_in_k),     y = x W_hat^T + b          (arXiv 2505.22811, eq. 4)

The dense weight exists only inside this layer's forward and backward, in a buffer that all layers share. Nothing of
it is saved for backward: the planes are unpacked again there, which is cheaper than the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mbdist_kernels import (
    WORD_BITS,
    column_square_sums,
    dequantize,
    reused_scratch,
    scale_gradients_and_signals,
    words_per_row,
)

_GRADIENT_CHUNK_BYTES = 16 << 20  # rows of G computed at a time: stays in a GPU's L2, bounded for any matrix


@dataclass
class Signal:
    """What a sink wants of a weight gradient G: ``values = G * outer(row_factor, column_factor)``."""

    row_factor: torch.Tensor  # (m,) fp32
    column_factor: torch.Tensor  # (n,) fp32
    values: torch.Tensor  # (m, 32 W) fp32, to be written; padding columns get 0


class SignalSink(Protocol):
    """Takes the Boolean signals of one layer out of its backward pass."""

    def signals(self, layer: MultiBooleanLinear) -> list[Signal]:
        """What is wanted of this pass; may be empty. Scales and planes are whole while it is called."""

    def take(
        self,
        layer: MultiBooleanLinear,
        signals: list[Signal],  # those handed out, written
        row_squares: torch.Tensor,  # (m,) fp64: sum over tokens of dY^2
        column_squares: torch.Tensor,  # (n,) fp64: sum over tokens of X^2
        tokens: int,
    ) -> None:
        """The layer's backward is done with the signals; the sink owns them now."""


class MultiBooleanLinear(nn.Module):
    """Drop-in for ``nn.Linear``: parameters ``plane_0 .. plane_{K-1}`` (m, W) int32, ``scale_out`` (K, m) and
    ``scale_in`` (K, n) fp32, and the float ``bias`` (m,) of the original layer.

    Planes are separate frozen parameters, never one stacked tensor: ZeRO-3 cuts every parameter flat over the ranks,
    and a stack would put the whole trained plane on the last of them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_planes: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,  # of the bias
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.num_planes = num_planes
        shape = (out_features, words_per_row(in_features))
        for k in range(num_planes):
            words = torch.zeros(shape, dtype=torch.int32, device=device)
            self.register_parameter(f"plane_{k}", nn.Parameter(words, requires_grad=False))
        scales = {"dtype": torch.float32, "device": device}
        self.scale_out = nn.Parameter(torch.ones(num_planes, out_features, **scales))
        self.scale_in = nn.Parameter(torch.ones(num_planes, in_features, **scales))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.signal_sink: SignalSink | None = None

    @property
    def planes(self) -> list[nn.Parameter]:
        return [getattr(self, f"plane_{k}") for k in range(self.num_planes)]

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A dense copy of W_hat (m, n), for inspection."""
        return dequantize(self.planes, self.scale_out.detach(), self.scale_in.detach(), dtype=dtype)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy, for model code that looks at a linear layer's ``weight``; writing to it changes nothing."""
        return self.dense_weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., n) -> (..., m)
        return _MultiBooleanProduct.apply(x, self.scale_out, self.scale_in, self.bias, self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, planes={self.num_planes}, "
            f"bias={self.bias is not None}"
        )


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _dense_in_scratch(layer: MultiBooleanLinear, dtype: torch.dtype) -> torch.Tensor:
    scratch = reused_scratch(layer.num_weights, dtype, layer.scale_out.device)
    out = scratch.view(layer.out_features, layer.in_features)
    return dequantize(layer.planes, layer.scale_out.detach(), layer.scale_in.detach(), out=out)


class _MultiBooleanProduct(torch.autograd.Function):
    """Planes and scales are read through the layer, in backward too: under ZeRO-3 they are gathered there again, and a
    tensor saved for backward would be the gathered copy kept alive."""

    @staticmethod
    def forward(ctx, x, scale_out, scale_in, bias, layer: MultiBooleanLinear):
        dtype = _compute_dtype(x)
        x = x.to(dtype)
        ctx.layer = layer
        ctx.save_for_backward(x)
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(x, _dense_in_scratch(layer, dtype), bias)

    @staticmethod
    def backward(ctx, grad_output):
        layer: MultiBooleanLinear = ctx.layer
        (x,) = ctx.saved_tensors
        dy = grad_output.reshape(-1, layer.out_features)  # (T, m)
        grad_x = grad_bias = grad_scale_out = grad_scale_in = None
        if ctx.needs_input_grad[0]:
            grad_x = (dy @ _dense_in_scratch(layer, dy.dtype)).view(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or layer.signal_sink is not None:
            grad_scale_out, grad_scale_in = _weight_pass(layer, dy, x.reshape(-1, layer.in_features))
        if ctx.needs_input_grad[3]:
            grad_bias = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        return grad_x, grad_scale_out, grad_scale_in, grad_bias, None


def _weight_pass(
    layer: MultiBooleanLinear,
    dy: torch.Tensor,  # (T, m)
    x: torch.Tensor,  # (T, n)
) -> tuple[torch.Tensor, torch.Tensor]:
    """G = dY^T X in chunks of rows; each chunk becomes scale gradients and signal and is overwritten by the next."""
    m, n = layer.out_features, layer.in_features
    scale_out, scale_in = layer.scale_out.detach(), layer.scale_in.detach()
    grad_out, grad_in = torch.empty_like(scale_out), torch.zeros_like(scale_in)
    sink = layer.signal_sink
    signals = sink.signals(layer) if sink is not None else []
    rows_at_a_time = max(WORD_BITS, _GRADIENT_CHUNK_BYTES // (n * dy.element_size()))
    buffer = reused_scratch(min(rows_at_a_time, m) * n, dy.dtype, dy.device)
    for first in range(0, m, rows_at_a_time):
        rows = slice(first, min(first + rows_at_a_time, m))
        chunk = buffer[: (rows.stop - first) * n].view(-1, n)
        torch.mm(dy[:, rows].T, x, out=chunk)
        scale_gradients_and_signals(
            chunk,
            [plane[rows] for plane in layer.planes],
            scale_out[:, rows],
            scale_in,
            grad_out[:, rows],
            grad_in,
            [(signal.row_factor[rows], signal.column_factor, signal.values[rows]) for signal in signals],
        )
    if sink is not None:
        sink.take(layer, signals, column_square_sums(dy), column_square_sums(x), dy.shape[0])
    return grad_out, grad_in

"""A linear layer whose weight is K packed sign planes and their scales.

    W_hat = sum_k B_k * outer(s_out_k, s_in_k),     y = x W_hat^T + b          (arXiv 2505.22811, eq. 4)

The dense weight exists only inside this layer's forward and backward, in a buffer that all layers share. Nothing of
it is saved for backward: the planes are unpacked again there, which is cheaper than the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from mbdist_kernels import (
    Signal,
    column_square_sums,
    dequantize,
    linear_backward_input,
    linear_backward_weight,
    linear_forward,
    words_per_row,
)

if TYPE_CHECKING:
    from mbdist.model.shared_input import SharedInput


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
        self.shared_input: SharedInput | None = None

    @property
    def planes(self) -> list[torch.Tensor]:
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
        if self.shared_input is not None and self.shared_input.serves(self, x):
            y = self.shared_input.multiply(self, x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return _MultiBooleanProduct.apply(x, self.scale_out, self.scale_in, self.bias, self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, planes={self.num_planes}, "
            f"bias={self.bias is not None}"
        )


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In what a layer multiplies ``x``: autocast may ask for another dtype than its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _MultiBooleanProduct(torch.autograd.Function):
    """Planes and scales are read through the layer, in backward too: under ZeRO-3 they are gathered there again, and a
    tensor saved for backward would be the gathered copy kept alive."""

    @staticmethod
    def forward(ctx, x, scale_out, scale_in, bias, layer: MultiBooleanLinear):
        x = x.to(product_dtype(x))
        ctx.layer = layer
        ctx.save_for_backward(x)
        y = linear_forward(x.reshape(-1, layer.in_features), layer.planes, scale_out.detach(), scale_in.detach(), bias)
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx, grad_output):
        layer: MultiBooleanLinear = ctx.layer
        (x,) = ctx.saved_tensors
        dy = grad_output.reshape(-1, layer.out_features)  # (T, m)
        weight = (layer.planes, layer.scale_out.detach(), layer.scale_in.detach())
        grad_x = grad_bias = grad_scale_out = grad_scale_in = None
        if ctx.needs_input_grad[0]:
            grad_x = linear_backward_input(dy, *weight).view(x.shape)
        sink = layer.signal_sink
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or sink is not None:
            x = x.reshape(-1, layer.in_features)
            signals = sink.signals(layer) if sink is not None else []
            grad_scale_out, grad_scale_in = linear_backward_weight(dy, x, *weight, signals)
            if sink is not None:
                sink.take(layer, signals, column_square_sums(dy), column_square_sums(x), dy.shape[0])
        if ctx.needs_input_grad[3]:
            grad_bias = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        return grad_x, grad_scale_out, grad_scale_in, grad_bias, None

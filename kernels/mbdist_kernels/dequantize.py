"""W_hat = sum_k B_k * outer(s_out_k, s_in_k): packed planes and scales to a dense matrix, in one pass.

The sum over planes is taken in fp32 in the order k = 0, 1, ... without fused multiply-add and rounded once, so the CPU
accelerator and the torch version give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbdist_kernels import native
from mbdist_kernels.layout import unpack_signs

_scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def reused_scratch(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat buffer of at least ``num_elements``, shared by all layers of the device: valid until the next call.

    One layer's weight is dense at a time, so one buffer as large as the largest layer serves a whole model.
    """
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < num_elements:
        buffer = _scratch[device, dtype] = torch.empty(num_elements, dtype=dtype, device=device)
    return buffer[:num_elements]


def dequantize(
    planes: Sequence[torch.Tensor],  # K tensors (m, W) int32
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    out: torch.Tensor | None = None,  # (m, n) fp32 or bf16, contiguous
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dense W_hat (m, n) in ``out`` (or a new tensor of ``dtype``)."""
    m, n = scale_out.shape[1], scale_in.shape[1]
    if out is None:
        out = torch.empty(m, n, dtype=dtype, device=scale_out.device)
    if native.serves(out, scale_out, scale_in):
        native.dequantize(planes, scale_out, scale_in, out)
        return out
    return out.copy_(dequantize_reference(planes, scale_out, scale_in))


def dequantize_reference(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor
) -> torch.Tensor:
    """The same in plain torch, in the scales' own dtype: the oracle, and the path where no accelerator serves."""
    n = scale_in.shape[1]
    dense = torch.zeros(scale_out.shape[1], n, dtype=scale_out.dtype, device=scale_out.device)
    for plane, out_k, in_k in zip(planes, scale_out, scale_in, strict=True):
        dense += out_k[:, None] * (unpack_signs(plane, n, scale_in.dtype) * in_k)
    return dense

"""W_hat = sum_k B_k * outer(s_out_k, s_in_k): packed planes and scales to a dense matrix, in one pass.

The sum over planes is taken in fp32 in the order k = 0, 1, ... without fused multiply-add and rounded once, so the CPU
accelerator and the torch version give the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from mbdist_kernels import native
from mbdist_kernels.layout import unpack_signs

_CHUNK_ELEMENTS = 1 << 22  # rows unpacked at a time where no accelerator serves: bounds the temporaries
_scratch = threading.local()  # two threads that serve models must not write into one buffer


def reused_scratch(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat buffer of at least ``num_elements``, shared by all layers of the device: valid until the next call in
    this thread (and, on a GPU, this stream).

    One layer's weight is dense at a time, so one buffer as large as the largest layer serves a whole model.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffers = _scratch.__dict__.setdefault("buffers", {})
    buffer = buffers.get((device, dtype, stream))
    if buffer is None or buffer.numel() < num_elements:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training later
            buffer = buffers[device, dtype, stream] = torch.empty(num_elements, dtype=dtype, device=device)
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
    if native.serves(out) and native.takes_scales(scale_out, scale_in):
        native.dequantize(planes, scale_out, scale_in, out)
        return out
    rows_at_a_time = max(1, _CHUNK_ELEMENTS // n)
    for first in range(0, m, rows_at_a_time):
        rows = slice(first, first + rows_at_a_time)
        out[rows] = dequantize_reference([plane[rows] for plane in planes], scale_out[:, rows], scale_in)
    return out


def dequantize_reference(
    planes: Sequence[torch.Tensor], scale_out: torch.Tensor, scale_in: torch.Tensor
) -> torch.Tensor:
    """The same in plain torch, in the scales' own dtype: the oracle, and the path where no accelerator serves."""
    n = scale_in.shape[1]
    dense = torch.zeros(scale_out.shape[1], n, dtype=scale_out.dtype, device=scale_out.device)
    for plane, out_k, in_k in zip(planes, scale_out, scale_in, strict=True):
        dense += out_k[:, None] * (unpack_signs(plane, n, scale_in.dtype) * in_k)
    return dense

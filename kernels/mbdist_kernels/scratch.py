"""Memory that operations write a dense matrix to and forget."""

from __future__ import annotations

import threading

import torch

_buffers = threading.local()  # two threads that serve models must not write into one buffer


def reused_scratch(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat buffer of at least ``num_elements``, shared by all layers of the device: valid until the next call in
    this thread (and, on a GPU, this stream).

    One layer's weight is dense at a time, so one buffer as large as the largest layer serves a whole model.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffers = _buffers.__dict__.setdefault("buffers", {})
    buffer = buffers.get((device, dtype, stream))
    if buffer is None or buffer.numel() < num_elements:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training later
            buffer = buffers[device, dtype, stream] = torch.empty(num_elements, dtype=dtype, device=device)
    return buffer[:num_elements]

"""Memory that operations write a dense matrix to and forget."""

from __future__ import annotations

import threading

import torch

_buffers = threading.local()  # two threads that serve models must not write into one buffer


def reused_scratch(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat buffer of ``num_elements``, valid until the next call in this thread.

    One layer's weight is dense at a time, so memory for the largest layer serves a whole model. On a CPU it is kept: a
    fresh allocation of its size would be paged in anew every time. On a GPU torch's allocator hands the same block out
    again, in the order of the stream and of captured graphs.
    """
    if device.type != "cpu":
        return torch.empty(num_elements, dtype=dtype, device=device)
    buffers = _buffers.__dict__.setdefault("buffers", {})
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < num_elements:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training later
            buffer = buffers[dtype] = torch.empty(num_elements, dtype=dtype)
    return buffer[:num_elements]

"""Registers the operations of this package with torch as ``torch.ops.mbdist.*``.

An operation has an implementation for CPU tensors, one for CUDA tensors and a fake one that says shapes and dtypes, so
that ``torch.compile`` and fake tensors take it as it is. Defined on a ``Library`` and not by ``custom_op``: a call
costs a quarter of the time, which small decoding steps notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import library

_OPERATIONS = library.Library("mbdist", "DEF")
_interpreted = False


def operation(schema: str, *, cpu: Callable, cuda: Callable, fake: Callable) -> Any:
    """Define ``schema`` (``name(arguments) -> results``) and return the operation, to be called."""

    def on_cpu(*arguments):
        return (cuda if _interpreted else cpu)(*arguments)

    def on_cuda(*arguments):
        # Triton launches on the current device, which need not be the tensors' where a model spans several.
        device = _first_tensor(arguments).device
        if device.index == torch.cuda.current_device():
            return cuda(*arguments)
        with torch.cuda.device(device):
            return cuda(*arguments)

    name = schema.split("(")[0]
    _OPERATIONS.define(schema, tags=torch.Tag.needs_fixed_stride_order)
    _OPERATIONS.impl(name, on_cpu, "CPU")
    _OPERATIONS.impl(name, on_cuda, "CUDA")
    library.register_fake(f"mbdist::{name}", fake, lib=_OPERATIONS)
    return getattr(torch.ops.mbdist, name).default


def _first_tensor(arguments: tuple) -> torch.Tensor:
    first = arguments[0]
    return first if isinstance(first, torch.Tensor) else first[0]


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Run the kernels themselves on CPU tensors, by Triton's interpreter: slow, for tests. Raises RuntimeError where
    TRITON_INTERPRET=1 was not set before this package was imported."""
    global _interpreted
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before mbdist_kernels is imported")
    _interpreted = True
    try:
        yield
    finally:
        _interpreted = False

"""What others' kernels take for a product with a 1-bit weight, where they are installed: GemLite and BitBLAS.

Both multiply fp16 by one bit a weight, without scales that vary over columns: less than a plane of ours does. They need
a GPU, and neither is a dependency: ``pip install gemlite bitblas``.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch

Calls = list[Callable[[], object]]


def gemlite_calls(m: int, n: int, batch: int, copies: int) -> Calls:
    """Products of ``batch`` tokens with as many weights (m, n)."""
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(
        1, group_size=n, in_features=n, out_features=m, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    bits = torch.randint(0, 2, (m, n), dtype=torch.uint8, device="cuda")
    steps, middles = (torch.full((m, 1), value, dtype=torch.float16, device="cuda") for value in (2.0, 0.5))
    layer.pack(bits, steps, middles, None)  # (bit - 1/2) * 2 is +-1
    x = torch.randn(batch, n, dtype=torch.float16, device="cuda")
    return [lambda layer=each: layer(x) for each in [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]]


def bitblas_calls(m: int, n: int, batch: int, copies: int) -> Calls:
    """The same. Compiles its kernel first: minutes."""
    import bitblas

    config = bitblas.MatmulConfig(
        M=batch, N=m, K=n, A_dtype="float16", W_dtype="uint1", accum_dtype="float16", out_dtype="float16", layout="nt"
    )
    multiply = bitblas.Matmul(config)
    weight = multiply.transform_weight(torch.randint(0, 2, (m, n), dtype=torch.int8, device="cuda"))
    x = torch.randn(batch, n, dtype=torch.float16, device="cuda")
    return [lambda weight=each: multiply(x, weight) for each in [weight, *(weight.clone() for _ in range(copies - 1))]]


OTHERS = {"gemlite": gemlite_calls, "bitblas": bitblas_calls}


def why_not(package: str) -> str | None:
    """Why it is not measured here; None where it is."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return None if torch.cuda.is_available() else "needs a GPU"

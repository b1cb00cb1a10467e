"""Every kernel, on a GPU or else in the interpreter, against the version for the CPU: equal where the operation is on
bits, near where sums are taken."""

from contextlib import nullcontext

import pytest
import torch
from test_linear_math import random_planes
from test_registration import CASES, operation_of
from test_words import random_words

from mbdist_kernels import flip_counts
from mbdist_kernels.flip_mask import elements_of_mask
from mbdist_kernels.registration import kernels_on_cpu

KERNELS_ON = "cuda" if torch.cuda.is_available() else "cpu"
SUMS = {"linear_decode", "linear_forward", "scale_gradients_and_signals", "signal_encode", "column_square_sums"}


def larger_cases():
    """Several blocks in every direction, ragged edges."""
    torch.manual_seed(0)
    planes, scale_out, scale_in = random_planes(300, 2100, 3)
    for tokens in (1, 16, 17, 200):
        x = torch.randn(tokens, 2100).bfloat16()
        yield "linear_forward", (x, planes, scale_out, scale_in, torch.randn(300))
    narrow = [random_planes(m, 2100, 3) for m in (64, 1, 70)]  # a block of rows whole, of one row, and ragged
    of_all = zip((planes, scale_out, scale_in), *narrow, strict=True)
    planes_of_all, *scales = [list(of_weights) for of_weights in of_all]
    planes_of_all = [plane for of_weight in planes_of_all for plane in of_weight]
    yield "linear_decode", (torch.randn(5, 2100).bfloat16(), planes_of_all, *scales)
    for dtype in (torch.float32, torch.bfloat16):
        yield "dequantize", (planes, scale_out, scale_in, torch.empty(300, 2100, dtype=dtype))
        yield "pack_signs", (torch.randn(300, 2100).to(dtype),)
    signals = ([torch.randn(300)], [torch.randn(2100)], [], [random_words(300, 66)], [torch.zeros(300)])
    gradients = (torch.zeros(3, 300), torch.zeros(3, 2100))
    gradient = torch.randn(300, 2100).bfloat16()
    yield "scale_gradients_and_signals", (gradient, planes, scale_out, scale_in, *gradients, *signals)
    yield "signal_encode", (torch.randn(300, 2100),)
    for dtype in (torch.float32, torch.bfloat16):
        yield "column_square_sums", (torch.randn(200, 300).to(dtype),)
    accumulator = torch.randint(-127, 128, (640_000,), dtype=torch.int8)
    signal = torch.randn(3, 640_000) * 0.3
    signal[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
    yield "accumulate_signal", (accumulator, signal, 30_000, 1 << 20, [7, 2**32 - 5, 9], 2**33, 64 << 15, 127)
    yield "candidate_mask", (accumulator, random_words(20_000), 64)
    pairs = torch.randint(0, 256, (320_000,), dtype=torch.uint8)
    yield "accumulate_signal", (pairs, signal, 30_000, 1 << 17, [7, 2**32 - 5, 9], 2**33, 4 << 15, 7)
    yield "candidate_mask", (pairs, None, 4)
    values = torch.randn(33, 2112) * 10 ** torch.randn(33, 1)
    values[7, 9], values[8, 10], values[9] = torch.nan, torch.inf, 0.0
    for bits in (8, 4):
        yield "encode_rows", (values, bits)
    yield "draw_signs", (values, 2**32 - 5)
    for bits in (8, 4, 1):
        yield (
            "decode_rows",
            (random_words(33, 66 * bits), values[:, 9].clone(), torch.randn(2112), torch.empty(33, 2112)),
        )
    yield "vote", (random_words(8, 20_001),)
    yield "popcount", (random_words(20_001), 2048)
    mask = random_words(20_001) & random_words(20_001, seed=1) & random_words(20_001, seed=2)
    yield "flip_encode_sparse", (mask, flip_counts(mask))
    yield "flip_mask", (elements_of_mask(mask), 20_001)


@pytest.mark.parametrize(("name", "arguments"), [*CASES.items(), *larger_cases()])
def test_operation(name, arguments):
    if name.startswith("linear_decode") and arguments[0].dtype == torch.float32:
        arguments = (arguments[0].bfloat16(), *arguments[1:])  # kernels multiply in bf16
    operation, name = operation_of(name), name.split(",")[0]
    found, expected = [], []
    for device, results in ((KERNELS_ON, found), ("cpu", expected)):
        given = [_copy(argument, device) for argument in arguments]
        with kernels_on_cpu() if results is found and device == "cpu" else nullcontext():
            result = operation(*given)
        changed = given if result is None else result if isinstance(result, tuple) else [result]
        results += [t.cpu() for part in changed for t in (part if isinstance(part, list) else [part]) if _is_tensor(t)]
    for a, b in zip(found, expected, strict=True):
        if name in SUMS and a.is_floating_point():
            assert (a.float() - b.float()).norm() <= 6e-3 * b.float().norm() + 1e-6
        elif (
            name == "scale_gradients_and_signals" and a.dtype == torch.int32
        ):  # signs of what is near zero may differ by a rounding
            assert (a != b).float().mean() < 0.01
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def _copy(value, device: str):
    if isinstance(value, list):
        return [_copy(each, device) for each in value]
    return value.clone().to(device) if _is_tensor(value) else value

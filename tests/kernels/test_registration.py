"""The operations are known to torch: fake tensors, mutation, ``torch.compile``."""

import pytest
import torch
from test_linear_math import random_planes
from test_words import random_words
from torch import library

import mbdist_kernels as kernels

PLANES, SCALE_OUT, SCALE_IN = random_planes(33, 70, 2)


def cases():
    torch.manual_seed(0)
    accumulator = torch.zeros(64, dtype=torch.int8)
    factors = ([torch.ones(33)], [torch.ones(70)])
    gradients = (torch.zeros(2, 33), torch.zeros(2, 70))
    yield "pack_signs", (torch.randn(3, 40),)
    yield "unpack_signs", (random_words(3, 2), 40, torch.bfloat16)
    yield "unpack_bits", (random_words(3, 2),)
    yield "popcount", (random_words(3, 2), 4)
    yield "flip_mask", (torch.tensor([3, 70, 71], dtype=torch.int32), 4)
    yield "xor_apply", (random_words(6), random_words(6))
    yield "dequantize", (PLANES, SCALE_OUT, SCALE_IN, torch.empty(33, 70))
    yield "linear_decode", (torch.randn(2, 70), PLANES, [SCALE_OUT], [SCALE_IN])
    others, *scales = random_planes(7, 70, 2)
    together = [[of, other] for of, other in zip((SCALE_OUT, SCALE_IN), scales, strict=True)]
    yield "linear_decode, 2 weights", (torch.randn(2, 70), [*PLANES, *others], *together)
    yield "linear_forward", (torch.randn(20, 70), PLANES, SCALE_OUT, SCALE_IN, None)
    yield "linear_forward, with bias", (torch.randn(20, 70), PLANES, SCALE_OUT, SCALE_IN, torch.randn(33))
    epilogue = (torch.randn(33, 70), PLANES, SCALE_OUT, SCALE_IN, *gradients, *factors)
    yield "scale_gradients_and_signals", (*epilogue, [torch.zeros(33, 96)], [], [])
    yield "scale_gradients_and_signals, in words", (*epilogue, [], [random_words(33, 3)], [torch.zeros(33)])
    yield "column_square_sums", (torch.randn(70, 33),)
    yield "accumulate_signal", (accumulator, torch.randn(1, 64), 1 << 15, 1 << 21, [7], 0, 1 << 21, 127)
    yield "candidate_mask", (accumulator, random_words(2), 64)
    pairs = torch.zeros(32, dtype=torch.uint8)
    yield "accumulate_signal, int4", (pairs, torch.randn(1, 64), 1 << 15, 1 << 17, [7], 0, 1 << 17, 7)
    yield "candidate_mask, int4", (pairs, random_words(2), 4)
    yield "vote", (random_words(3, 5),)
    yield "signal_encode", (torch.randn(3, 40),)
    yield "signal_accumulate", (torch.zeros(3, 40), random_words(2, 3, 2), torch.rand(2, 3))
    yield "encode_rows", (torch.randn(3, 64), 4)
    yield "draw_signs", (torch.randn(3, 64), 2**32 - 7)
    yield "decode_rows", (random_words(3, 8), torch.rand(3), torch.rand(64), torch.empty(3, 64))
    yield "flip_encode_sparse", (torch.tensor([5, 0, 8], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
    yield "flip_apply_sparse", (random_words(10), torch.zeros(1, dtype=torch.int16), torch.ones(1, dtype=torch.int32))


CASES = dict(cases())  # "operation, what of it"


def operation_of(case):
    return getattr(torch.ops.mbdist, case.split(",")[0]).default


@pytest.mark.parametrize("name", CASES)
def test_registration(name):
    library.opcheck(operation_of(name), CASES[name])


def test_every_operation_is_checked():
    assert {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "mbdist::" in name
    } == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # as many positions as there are flips
def test_every_operation_compiles(name):
    torch._dynamo.reset()
    found, expected = copied(CASES[name]), copied(CASES[name])
    result = torch.compile(operation_of(name), fullgraph=True)(*found)
    assert_same((result, found), (operation_of(name)(*expected), expected))


def copied(value):
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_same(found, expected):
    if isinstance(expected, list | tuple):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_of_operations_compiles_whole(backend):
    def step(x, words, mask):
        kernels.xor_apply(words, mask)
        weight = kernels.dequantize([words, *PLANES[1:]], SCALE_OUT, SCALE_IN)
        return kernels.linear_forward(x, [words, *PLANES[1:]], SCALE_OUT, SCALE_IN) + x @ weight.T

    x, mask = torch.randn(20, 70), random_words(33, 3)
    mask[:, 2] &= (1 << 6) - 1  # padding stays 0
    eager, compiled = PLANES[0].clone(), PLANES[0].clone()
    expected = step(x, eager, mask)
    found = torch.compile(step, fullgraph=True, backend=backend)(x, compiled, mask)
    assert torch.equal(eager, compiled)
    torch.testing.assert_close(found, expected)

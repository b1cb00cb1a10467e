"""The products of a multi-Boolean layer, on every implementation, against float64 on the same rounded inputs."""

import importlib

import pytest
import torch
from test_linear_math import dense64, random_planes

from mbdist_kernels import (
    Signal,
    launch,
    linear_backward,
    linear_backward_input,
    linear_backward_weight,
    linear_decode,
    linear_decode_together,
    linear_forward,
    native,
    pack_signs,
    registration,
    scale_gradients_and_signals,
)
from mbdist_kernels.linear_forward import linear_forward_reference, linear_in_tiles_triton

TOKENS = [1, 3, 16, 17, 65]
SHAPES = [(3, 40), (70, 300)]  # the second: more than two blocks of 128 columns, and a ragged one


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rounded_weight(planes, scale_out, scale_in) -> torch.Tensor:
    """What tiles and scratch hold: bf16."""
    return dense64(planes, scale_out, scale_in).float().bfloat16().double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_tokens", [1, 3, 16])
@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(implementation, shape, num_planes, num_tokens):
    planes, scale_out, scale_in = random_planes(*shape, num_planes)
    x = torch.randn(num_tokens, shape[1])
    y = linear_decode(x, planes, scale_out, scale_in)
    if implementation == "triton":  # takes s_in * x in bf16
        expected = 0
        for plane, out_k, in_k in zip(planes, scale_out, scale_in, strict=True):
            signs = dense64([plane], torch.ones(1, shape[0]), torch.ones(1, shape[1]))
            expected += ((x * in_k).bfloat16().double() @ signs.T) * out_k.double()
    else:
        expected = x.double() @ dense64(planes, scale_out, scale_in).T
    assert y.shape == (num_tokens, shape[0]) and relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("split", [1, 4])
def test_decode_over_several_blocks_of_rows_and_turns_of_the_loop(split, monkeypatch):
    monkeypatch.setattr(importlib.import_module("mbdist_kernels.linear_decode"), "_MEASURED_ROWS", 130)  # none for more
    planes, scale_out, scale_in = random_planes(130, 2100, 2)
    x = torch.randn(3, 2100).bfloat16()
    chosen = {"BLOCK_ROWS": 64, "BLOCKS_AT_A_TIME": 4, "SPLIT": split, "num_warps": 4, "num_stages": 3}
    with registration.kernels_on_cpu(), launch.trying("linear_decode", chosen):
        y = linear_decode(x, planes, scale_out, scale_in)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x.double() @ dense64(planes, scale_out, scale_in).T) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_gives_the_dtype_it_takes_and_honours_strides(implementation, dtype):
    planes, scale_out, scale_in = random_planes(40, 70, 2)
    wider = torch.randn(2, 80)
    wider[:, ::2] = scale_out
    x = torch.randn(2, 70).to(dtype)
    y = linear_decode(x, planes, wider[:, ::2], scale_in)
    assert y.dtype == dtype and torch.equal(y, linear_decode(x, planes, scale_out, scale_in))


@pytest.mark.parametrize(("num_planes", "num_tokens"), [(1, 16), (2, 1), (3, 3), (4, 16)])
def test_weights_decoded_together_give_what_each_gives_alone(implementation, num_planes, num_tokens):
    weights = [random_planes(m, 300, num_planes) for m in (70, 1, 3, 64)]
    x = torch.randn(num_tokens, 300)
    together = linear_decode_together(x, weights)
    assert [y.shape for y in together] == [(num_tokens, m) for m in (70, 1, 3, 64)]
    for y, weight in zip(together, weights, strict=True):
        if implementation == "triton":  # the parts that a row is cut into depend on the number of rows
            torch.testing.assert_close(y, linear_decode(x, *weight))
        else:
            assert torch.equal(y, linear_decode(x, *weight))


def test_decode_refuses_more_tokens_and_weights_of_unequal_planes():
    weight = random_planes(8, 8, 1)
    with pytest.raises(ValueError, match="up to 16 tokens"):
        linear_decode(torch.randn(17, 8), *weight)
    with pytest.raises(ValueError, match=r"same number of planes, not \[1, 2\]"):
        linear_decode_together(torch.randn(1, 8), [weight, random_planes(8, 8, 2)])


def test_a_token_that_is_not_finite_stays_alone(implementation):
    planes, scale_out, scale_in = random_planes(40, 130, 2)
    x = torch.randn(4, 130)
    alone = linear_decode(x[[0, 3]], planes, scale_out, scale_in)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    y = linear_decode(x, planes, scale_out, scale_in)
    torch.testing.assert_close(y[[0, 3]], alone)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()


def test_a_token_that_is_not_finite_stays_alone_in_tiles():
    planes, scale_out, scale_in = random_planes(40, 70, 2)
    x = torch.randn(20, 70).bfloat16()
    alone = linear_in_tiles_triton(x, planes, scale_out, scale_in)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    y = linear_in_tiles_triton(x, planes, scale_out, scale_in)
    assert torch.equal(y[3:], alone[3:]) and torch.equal(y[0], alone[0])
    assert not y[1:3].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_stays_alone_in_a_dense_product_and_in_dx(implementation, value, dtype):
    planes, scale_out, scale_in = random_planes(40, 70, 2)
    for multiply, columns in ((linear_forward, 70), (linear_backward_input, 40)):
        x = torch.randn(20, columns).to(dtype)
        alone = multiply(x, planes, scale_out, scale_in)
        x[1, 5] = value
        y = multiply(x, planes, scale_out, scale_in)
        others = torch.arange(20) != 1
        torch.testing.assert_close(y[others], alone[others])
        assert alone.isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(shape, num_planes, num_tokens):
    planes, scale_out, scale_in = random_planes(*shape, num_planes)
    x = torch.randn(num_tokens, shape[1]).bfloat16()
    y = linear_in_tiles_triton(x, planes, scale_out, scale_in)
    assert relative_error(y, x.double() @ rounded_weight(planes, scale_out, scale_in).T) < 4e-3  # rounding of y


def test_tiles_of_several_blocks():
    planes, scale_out, scale_in = random_planes(150, 200, 2)
    x = torch.randn(140, 200).bfloat16()
    y = linear_in_tiles_triton(x, planes, scale_out, scale_in)
    assert relative_error(y, x.double() @ rounded_weight(planes, scale_out, scale_in).T) < 4e-3  # rounding of y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_planes"),
    [(tokens, (i + more) % 4 + 1) for i, tokens in enumerate(TOKENS) for more in (0, 2)],  # half of all pairs
)
def test_forward_with_bias(implementation, num_tokens, num_planes, dtype):
    planes, scale_out, scale_in = random_planes(70, 300, num_planes)
    x, bias = torch.randn(num_tokens, 300).to(dtype), torch.randn(70)
    y = linear_forward(x, planes, scale_out, scale_in, bias)
    expected = x.double() @ dense64(planes, scale_out, scale_in).T + bias.double()
    assert relative_error(linear_forward_reference(x, planes, scale_out, scale_in, bias), expected) < 6e-3
    assert y.dtype == dtype and relative_error(y, expected) < (6e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("dense_from", [1, 5, 17, 99])
@pytest.mark.skipif(native.accelerator() is None, reason="no compiler for the CPU accelerator")
def test_a_cpu_makes_the_weight_dense_from_the_table_s_number_of_tokens_on(num_planes, dense_from, monkeypatch):
    module = importlib.import_module("mbdist_kernels.linear_forward")
    weight = random_planes(8, 40, num_planes)
    packed = []
    monkeypatch.setattr(module, "linear_decode", lambda x, *weight: packed.append(len(x)) or linear_decode(x, *weight))
    with launch.trying("dense_from_cpu", {"tokens": dense_from}):
        for tokens in (1, 4, 5, 16, 17):
            linear_forward(torch.randn(tokens, 40), *weight)
    assert packed == [tokens for tokens in (1, 4, 5, 16) if tokens < dense_from]


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_backward_and_its_identities(implementation, num_tokens, num_planes):
    m, n = 70, 100
    planes, scale_out, scale_in = random_planes(m, n, num_planes)
    x, dy = torch.randn(num_tokens, n), torch.randn(num_tokens, m)
    weight = dense64(planes, scale_out, scale_in)
    dx = linear_backward_input(dy, planes, scale_out, scale_in)
    assert relative_error(dx, dy.double() @ weight) < 1e-5
    signal = Signal(scale_out[-1], scale_in[-1], torch.full((m, 128), torch.nan))
    grad_out, grad_in = linear_backward_weight(dy, x, planes, scale_out, scale_in, [signal])
    g = dy.double().T @ x.double()
    q = g * scale_out[-1].double()[:, None] * scale_in[-1].double()
    assert relative_error(signal.values[:, :n], q) < 1e-5 and not signal.values[:, n:].any()
    # method: sum_k s_out_k dL/ds_out_k = sum_t dY Y by row, sum_k s_in_k dL/ds_in_k = sum_t X dX by column
    y = x.double() @ weight.T
    torch.testing.assert_close((scale_out * grad_out).sum(0).double(), (dy * y).sum(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((scale_in * grad_in).sum(0).double(), (x * dx).sum(0).double(), rtol=1e-3, atol=1e-3)


def test_the_weight_gradient_is_never_whole(monkeypatch):
    """Chunks of 128 rows give what all rows at once give, in memory for one of them."""
    m, n = 300, 64
    planes, scale_out, scale_in = random_planes(m, n, 2)
    x, dy = torch.randn(9, n), torch.randn(9, m)
    found, sizes = [], []
    real = linear_backward.reused_scratch
    monkeypatch.setattr(linear_backward, "reused_scratch", lambda size, *of: sizes.append(size) or real(size, *of))
    for chunk_bytes in (1 << 30, 4):
        monkeypatch.setattr(linear_backward, "_CHUNK_BYTES", chunk_bytes)
        signal = Signal(scale_out[1], scale_in[1], torch.full((m, n), torch.nan))
        found.append((*linear_backward_weight(dy, x, planes, scale_out, scale_in, [signal]), signal.values))
    assert sizes == [m * n, 128 * n]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signals_as_words_are_those_of_the_values(implementation, dtype):
    planes, scale_out, scale_in = random_planes(65, 100, 2)
    gradient = torch.randn(65, 100).to(dtype)
    gradient[3, 4], gradient[5], gradient[6, 7] = torch.nan, 0, torch.inf
    factors = [(torch.randn(65), torch.randn(100)) for _ in range(2)]
    dense = [Signal(*pair, values=torch.full((65, 128), torch.nan)) for pair in factors]
    coded = [
        Signal(*pair, words=torch.full((65, 4), 7, dtype=torch.int32), magnitudes=torch.full((65,), torch.nan))
        for pair in factors
    ]
    grads = [(torch.full((2, 65), torch.nan), torch.zeros(2, 100)) for _ in range(2)]
    for signals, (grad_out, grad_in) in zip((dense, coded), grads, strict=True):
        scale_gradients_and_signals(gradient, planes, scale_out, scale_in, grad_out, grad_in, signals)
    for a, b in zip(dense, coded, strict=True):
        assert torch.equal(b.words, pack_signs(a.values))
        expected = a.values.abs().sum(1) / 100
        torch.testing.assert_close(b.magnitudes, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert b.magnitudes[3].isnan() and b.magnitudes[6].isinf() and b.magnitudes.isfinite().sum() == 63
    assert torch.equal(grads[0][0].nan_to_num(), grads[1][0].nan_to_num())


def test_signals_of_two_forms_or_in_other_memory_are_refused():
    planes, scale_out, scale_in = random_planes(8, 40, 1)
    given = torch.randn(8, 40), planes, scale_out, scale_in, torch.empty(1, 8), torch.zeros(1, 40)
    values = Signal(torch.ones(8), torch.ones(40), values=torch.empty(8, 64))
    words = Signal(torch.ones(8), torch.ones(40), None, torch.empty(8, 2, dtype=torch.int32), torch.empty(8))
    with pytest.raises(ValueError, match="all values, or all words"):
        scale_gradients_and_signals(*given, [values, words])
    values.values = torch.empty(64, 8).T
    with pytest.raises(ValueError, match="contiguous"):
        scale_gradients_and_signals(*given, [values])


def test_a_gradient_in_half_precision(implementation):
    planes, scale_out, scale_in = random_planes(20, 40, 1)
    gradient = torch.randn(20, 40).half()
    found = torch.empty(1, 20), torch.zeros(1, 40)
    scale_gradients_and_signals(gradient, planes, scale_out, scale_in, *found)
    expected = torch.empty(1, 20), torch.zeros(1, 40)
    scale_gradients_and_signals(gradient.float(), planes, scale_out, scale_in, *expected)
    torch.testing.assert_close(found, expected)

"""Dequantise and the weight pass against dense float64 algebra, on both CPU implementations."""

import pytest
import torch

from mbdist_kernels import (
    Signal,
    column_square_sums,
    dequantize,
    native,
    pack_signs,
    scale_gradients_and_signals,
    unpack_signs,
    words_per_row,
)
from mbdist_kernels.dequantize import dequantize_reference

SHAPES = [(1, 1), (1, 40), (33, 32), (65, 100), (96, 160)]


def random_planes(m, n, num_planes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    planes = [pack_signs(torch.randn(m, n, generator=generator)) for _ in range(num_planes)]
    scales = (torch.randn(num_planes, size, generator=generator) for size in (m, n))
    return planes, *scales


def dense64(planes, scale_out, scale_in):
    n = scale_in.shape[1]
    signs = torch.stack([unpack_signs(plane, n, torch.float64) for plane in planes])
    return (signs * scale_out.double()[:, :, None] * scale_in.double()[:, None, :]).sum(0)


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_matches_float64(implementation, shape, num_planes):
    planes, scale_out, scale_in = random_planes(*shape, num_planes)
    out = torch.full(shape, torch.nan)
    dequantize(planes, scale_out, scale_in, out=out)
    torch.testing.assert_close(out.double(), dense64(planes, scale_out, scale_in), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_gives_the_same_bits_on_both_implementations(implementation, shape, dtype):
    planes, scale_out, scale_in = random_planes(*shape, 3)
    out = dequantize(planes, scale_out, scale_in, dtype=dtype)
    assert torch.equal(out, dequantize_reference(planes, scale_out, scale_in).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_pass_matches_dense_algebra(implementation, shape, num_planes, dtype):
    m, n = shape
    planes, scale_out, scale_in = random_planes(m, n, num_planes)
    gradient = torch.randn(m, n).to(dtype)
    row_factor, column_factor = torch.randn(m), torch.randn(n)
    grad_out, grad_in = torch.full((num_planes, m), torch.nan), torch.ones(num_planes, n)
    signal = torch.full((m, 32 * words_per_row(n)), torch.nan)
    scale_gradients_and_signals(
        gradient, planes, scale_out, scale_in, grad_out, grad_in, [Signal(row_factor, column_factor, signal)]
    )
    g = gradient.double()
    for k, plane in enumerate(planes):
        signed = g * unpack_signs(plane, n, torch.float64)
        torch.testing.assert_close(grad_out[k].double(), signed @ scale_in[k].double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_in[k].double(), 1 + scale_out[k].double() @ signed, rtol=1e-4, atol=1e-4)
    expected = gradient.float() * row_factor[:, None] * column_factor
    assert torch.equal(signal[:, :n], expected)
    assert not signal[:, n:].any()


def test_rows_of_a_chunk_are_views(implementation):
    """The trainer passes row slices of planes and scales: strides must be honoured."""
    planes, scale_out, scale_in = random_planes(50, 70, 2)
    gradient = torch.randn(50, 70)
    whole = torch.empty(2, 50), torch.zeros(2, 70)
    scale_gradients_and_signals(gradient, planes, scale_out, scale_in, *whole)
    parts = torch.empty(2, 50), torch.zeros(2, 70)
    for rows in (slice(0, 32), slice(32, 50)):
        views = [plane[rows] for plane in planes]
        scale_gradients_and_signals(gradient[rows], views, scale_out[:, rows], scale_in, parts[0][:, rows], parts[1])
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(implementation, value):
    planes, scale_out, scale_in = random_planes(40, 48, 2)
    gradient = torch.randn(40, 48)
    gradient[7] = value
    grad_out, signal = torch.zeros(2, 40), torch.zeros(40, 64)
    scale_gradients_and_signals(
        gradient,
        planes,
        scale_out,
        scale_in,
        grad_out,
        torch.zeros(2, 48),
        [Signal(torch.ones(40), torch.ones(48), signal)],
    )
    others = torch.arange(40) != 7
    assert torch.isfinite(grad_out[:, others]).all() and torch.isfinite(signal[others]).all()
    assert not signal[7, :48].isfinite().any() and not signal[7, 48:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (130, 65), (257, 130)])
def test_column_square_sums(implementation, shape, dtype):
    values = torch.randn(shape).to(dtype)
    sums = column_square_sums(values)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, values.double().square().sum(0), rtol=1e-5, atol=1e-5)


def test_a_column_that_is_not_finite_stays_alone(implementation):
    values = torch.randn(70, 40)
    values[3, 5], values[66, 6] = torch.nan, -torch.inf
    finite = column_square_sums(values).isfinite()
    assert not finite[5:7].any() and finite.sum() == 38


@pytest.mark.skipif(native.accelerator() is None, reason="no compiler for the CPU accelerator")
def test_results_of_the_accelerator_do_not_depend_on_the_number_of_threads():
    planes, scale_out, scale_in = random_planes(200, 96, 2)
    gradient = torch.randn(200, 96)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grad_out, grad_in = torch.empty(2, 200), torch.zeros(2, 96)
        scale_gradients_and_signals(gradient, planes, scale_out, scale_in, grad_out, grad_in)
        results.append((dequantize(planes, scale_out, scale_in), grad_out, grad_in, column_square_sums(gradient)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

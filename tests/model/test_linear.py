"""The layer against autograd on the dense reconstruction in float64."""

import pytest
import torch

from mbdist.model.linear import MultiBooleanLinear, Signal
from mbdist_kernels import linear_backward, pack_signs, unpack_signs


def random_layer(m, n, num_planes, bias, dtype=torch.float32):
    layer = MultiBooleanLinear(n, m, num_planes, bias, dtype=dtype)
    for plane in layer.planes:
        plane.data = pack_signs(torch.randn(m, n))
    layer.scale_out.data = torch.randn(num_planes, m)
    layer.scale_in.data = torch.randn(num_planes, n)
    if bias:
        layer.bias.data = torch.randn(m, dtype=dtype)
    return layer


class RecordingSink:
    """Asks for the signal with given factors and keeps what comes."""

    def __init__(self, m, n):
        self.row_factor, self.column_factor = torch.randn(m), torch.randn(n)
        self.m, self.n = m, n

    def signals(self, layer):
        values = torch.full((self.m, -(-self.n // 32) * 32), torch.nan)
        other = torch.full_like(values, torch.nan)
        return [
            Signal(self.row_factor, self.column_factor, values),
            Signal(torch.ones(self.m), torch.full((self.n,), 2.0), other),
        ]

    def take(self, layer, signals, row_squares, column_squares, tokens):
        self.signal, self.doubled = (signal.values for signal in signals)
        self.row_squares, self.column_squares, self.tokens = row_squares, column_squares, tokens


def dense_oracle(layer, x, grad_y):
    """float64 autograd through W = sum_k B_k * outer; returns y, dx, ds_out, ds_in, db, G."""
    x = x.double().requires_grad_()
    scale_out = layer.scale_out.detach().double().requires_grad_()
    scale_in = layer.scale_in.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    signs = torch.stack([unpack_signs(plane, layer.in_features, torch.float64) for plane in layer.planes])
    weight = (signs * scale_out[:, :, None] * scale_in[:, None, :]).sum(0)
    weight.retain_grad()
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(grad_y.double())
    return y, x.grad, scale_out.grad, scale_in.grad, None if bias is None else bias.grad, weight.grad


def assert_near(found, expected, tolerance):
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 64), (65, 100)])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (1, 1), (2, 3, 4)])
def test_matches_autograd_in_float64(implementation, shape, num_planes, bias, lead):
    torch.manual_seed(1)
    m, n = shape
    layer = random_layer(m, n, num_planes, bias)
    layer.signal_sink = sink = RecordingSink(m, n)
    x = torch.randn(*lead, n, requires_grad=True)
    grad_y = torch.randn(*lead, m)
    y = layer(x)
    y.backward(grad_y)
    y64, dx, ds_out, ds_in, db, g = dense_oracle(layer, x.detach(), grad_y)
    assert y.shape == y64.shape
    for found, expected in (
        (y, y64),
        (x.grad, dx),
        (layer.scale_out.grad, ds_out),
        (layer.scale_in.grad, ds_in),
        (sink.signal[:, :n], g * sink.row_factor.double()[:, None] * sink.column_factor),
        (sink.row_squares, grad_y.reshape(-1, m).double().square().sum(0)),
        (sink.column_squares, x.detach().reshape(-1, n).double().square().sum(0)),
    ):
        assert_near(found, expected, 2e-5)
    if bias:
        assert_near(layer.bias.grad, db, 2e-5)
    assert sink.tokens == x[..., 0].numel() and not sink.signal[:, n:].any()


def test_scale_gradient_identities():
    """sum_k s_out_k ds_out_k = sum_t dY*Y by row, and the same by column for s_in and X."""
    layer = random_layer(40, 72, 3, bias=False)
    x = torch.randn(16, 72, requires_grad=True)
    grad_y = torch.randn(16, 40)
    y = layer(x)
    y.backward(grad_y)
    torch.testing.assert_close(
        (layer.scale_out * layer.scale_out.grad).sum(0), (grad_y * y).sum(0), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close((layer.scale_in * layer.scale_in.grad).sum(0), (x * x.grad).sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk_bytes", [1, 4096])
def test_gradient_in_chunks_of_rows(monkeypatch, chunk_bytes):
    """A matrix larger than the chunk gives what one chunk gives."""
    layer = random_layer(100, 64, 2, bias=False)
    x, grad_y = torch.randn(9, 64), torch.randn(9, 100)
    results = []
    for size in (1 << 24, chunk_bytes):
        monkeypatch.setattr(linear_backward, "_CHUNK_BYTES", size)
        layer.zero_grad()
        layer.signal_sink = sink = RecordingSink(100, 64)
        sink.row_factor, sink.column_factor = torch.ones(100), torch.ones(64)
        layer(x).backward(grad_y)
        results.append((layer.scale_out.grad, layer.scale_in.grad, sink.signal))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5)


def test_bf16_under_autocast_keeps_fp32_scale_gradients():
    layer = random_layer(48, 64, 2, bias=True)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.scale_out.grad.dtype == layer.scale_in.grad.dtype == torch.float32
    *_, ds_out, ds_in, _, _ = dense_oracle(layer, x, torch.ones(4, 48))
    assert_near(layer.scale_out.grad, ds_out, 2e-2)
    assert_near(layer.scale_in.grad, ds_in, 2e-2)


def test_no_dense_weight_outlives_forward_or_backward():
    """What autograd keeps of a pass is the input, not the weight: the method's memory claim."""
    layer = random_layer(64, 96, 2, bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(3, 96, requires_grad=True))
    assert kept == [torch.Size([3, 96])]


def test_works_with_checkpointing_and_in_inference_mode():
    layer = random_layer(32, 64, 2, bias=False)
    x = torch.randn(4, 64, requires_grad=True)
    plain = layer(x)
    plain.sum().backward()
    expected = layer.scale_in.grad.clone()
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(layer.scale_in.grad, expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), plain)


def test_serving_before_training_in_one_process():
    """The shared buffer that an inference-mode pass made must be writable afterwards."""
    layer = random_layer(300, 500, 2, bias=False)  # larger than any buffer of the tests above
    x = torch.randn(4, 500, requires_grad=True)
    with torch.inference_mode():
        served = layer(x)
    trained = layer(x)
    trained.sum().backward()
    assert torch.equal(served, trained) and x.grad is not None


def test_a_model_cast_to_bf16_still_works():
    layer = random_layer(40, 64, 2, bias=True)
    x = torch.randn(3, 64)
    expected = layer(x)
    found = layer.to(torch.bfloat16)(x.bfloat16())
    assert_near(found, expected.double(), 3e-2)
    found.sum().backward()
    assert torch.isfinite(layer.scale_in.grad).all()


def test_threads_do_not_share_a_buffer():
    from concurrent.futures import ThreadPoolExecutor

    layers = [random_layer(200, 256, 2, bias=False) for _ in range(2)]
    x = torch.randn(1, 256)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(100):
                found = list(pool.map(lambda layer: torch.no_grad()(layer)(x), layers))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

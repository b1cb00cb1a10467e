"""Nearest levels and error feedback: exact on both CPU implementations, and right by brute force."""

import itertools

import pytest
import torch

from mbdist_kernels import feed_errors_forward, nearest_levels, signs_of_codes
from mbdist_kernels.nearest_levels import level_of

SHAPES = [(1, 1), (3, 40), (33, 64), (20, 129)]


def random_levels(m, n, num_planes):
    generator = torch.Generator().manual_seed(m * n + num_planes)
    weight = torch.randn(m, n, generator=generator)
    scale_out, scale_in = (torch.rand(num_planes, size, generator=generator) for size in (m, n))
    return weight, scale_out, scale_in


def levels_of(codes, scale_out, scale_in):
    return sum(signs_of_codes(codes, k) * (scale_out[k][:, None] * scale_in[k]).double() for k in range(len(scale_in)))


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_level_is_nearer(implementation, shape, num_planes):
    weight, scale_out, scale_in = random_levels(*shape, num_planes)
    codes = nearest_levels(weight, scale_out, scale_in)
    magnitudes = (scale_out[:, :, None] * scale_in[:, None, :]).double()
    signs = itertools.product((1, -1), repeat=num_planes)
    distances = torch.stack(
        [(weight - sum(s * mag for s, mag in zip(pattern, magnitudes, strict=True))).abs() for pattern in signs]
    )
    chosen = (weight - levels_of(codes, scale_out, scale_in)).abs()
    torch.testing.assert_close(chosen, distances.min(0).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_implementations_give_the_same_bits(shape, num_planes, monkeypatch):
    from mbdist_kernels import native

    weight, scale_out, scale_in = random_levels(*shape, num_planes)
    upper = torch.rand(shape[1], shape[1], generator=torch.Generator().manual_seed(1)).triu() / 8 + torch.eye(shape[1])
    found = []
    for served in (native.serves, lambda *tensors: False):
        monkeypatch.setattr(native, "serves", served)
        left = weight.clone()
        found.append(
            (nearest_levels(weight, scale_out, scale_in), *feed_errors_forward(left, scale_out, scale_in, upper))
        )
    for accelerated, reference in zip(*found, strict=True):
        assert torch.equal(accelerated, reference)


def test_ties_go_to_the_lower_code(implementation):
    weight = torch.zeros(1, 3)
    assert nearest_levels(weight, torch.ones(1, 1), torch.ones(1, 3)).tolist() == [[0, 0, 0]]


def test_errors_are_fed_forward_as_in_the_worked_example(implementation):
    codes, errors = feed_errors_forward(
        torch.tensor([[0.4, 0.1]]), torch.ones(1, 1), torch.ones(1, 2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    )
    assert codes.tolist() == [[0, 0]]
    torch.testing.assert_close(errors, torch.tensor([[-0.6, -0.6]]))


def test_a_level_of_a_code_is_the_signed_sum():
    magnitudes = torch.tensor([3.0, 1.0])
    assert [level_of(magnitudes, code).item() for code in range(4)] == [4, -2, 2, -4]

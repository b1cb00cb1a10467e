import pytest
import torch

from mbdist.bench.uniform import bits_per_weight, gptq, round_to_nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_round_to_nearest_is_within_half_a_step(bits):
    weight = torch.randn(16, 100)
    rounded = round_to_nearest(weight, bits, 32)
    for part, of in zip(rounded.split(32, 1), weight.split(32, 1), strict=True):
        step = (of.amax(1, keepdim=True).clamp_min(0) - of.amin(1, keepdim=True).clamp_max(0)) / (2**bits - 1)
        assert ((part - of).abs() <= step * 1.01).all()
        assert all(len(row.unique()) <= 2**bits for row in part)
    assert bits_per_weight(bits, 32) == bits + (32 + bits) / 32


def test_gptq_keeps_outputs_better_than_rounding():
    x = torch.randn(2000, 96) @ (torch.randn(96, 96) * torch.rand(96).mul(3).exp()[:, None])
    weight = torch.randn(48, 96)
    errors = [
        ((weight - found) @ x.T).square().sum()
        for found in (round_to_nearest(weight, 3, 32), gptq(weight, x.T @ x, 3, 32))
    ]
    assert errors[1] < 0.5 * errors[0]

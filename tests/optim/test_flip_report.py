"""What steps report of themselves, against what is computed here; and the guard against oscillation."""

import pytest
import torch

from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import ReplicatedPlanes
from mbdist.config.comm import CommConfig
from mbdist.config.optimizers import BooleanOptimizerConfig
from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim import BooleanOptimizer
from mbdist_kernels import ACCUMULATOR_FORMATS, pack_signs, unpack_signs

M, N = 32, 64
STEP_SIZES = {"curvature": 100.0, "evidence": 1.0, "rms": 1.0, "raw": 0.2}


def layer_and_optimizer(num_planes=2, **settings):
    torch.manual_seed(0)
    layer = MultiBooleanLinear(N, M, num_planes, bias=False)
    for plane in layer.planes:
        plane.data = pack_signs(torch.randn(M, N))
    layer.scale_out.data, layer.scale_in.data = torch.rand(num_planes, M) + 0.5, -torch.rand(num_planes, N) - 0.5
    config = BooleanOptimizerConfig(**{"max_flip_rate": 1.0, "warmup_fraction": 0.0, "max_step": 1.0} | settings)
    optimizer = BooleanOptimizer({"l": layer}, config, CommConfig(codec="fp32"), Communicator(), 10**6, 1, seed=0)
    optimizer.store = ReplicatedPlanes([layer.planes], optimizer.partitions, optimizer.communicator)
    return layer, optimizer


def signs_of_last_plane(layer):
    return unpack_signs(layer.planes[-1].data, N).double()


def one_step(layer, optimizer, x, dy):
    layer(x).backward(dy)
    optimizer.finish_micro_batch()
    assert optimizer.all_finite(torch.zeros(()))
    return optimizer.step()


@pytest.mark.parametrize("rule", STEP_SIZES)
def test_a_probed_step_predicts_the_second_order_change_of_its_flips(rule):
    """-2 B q + 2 s^2 h of every bit that flipped, q of the step's own gradient."""
    layer, optimizer = layer_and_optimizer(signal=rule, step_size=STEP_SIZES[rule])
    for step in range(3):
        x, dy = torch.randn(50, N), torch.randn(50, M)
        optimizer.probing = step == 2
        before = signs_of_last_plane(layer)
        scales = layer.scale_out.data[1], layer.scale_in.data[1]
        rows, columns = optimizer.curvature.cost_of_a_flip(0, *scales) if step else (None, None)
        report = one_step(layer, optimizer, x, dy)
    flipped = signs_of_last_plane(layer) != before
    q = (dy.T @ x).double() * torch.outer(*scales).double()
    expected = (-2 * before * q + 2 * torch.outer(rows, columns))[flipped].sum().item()
    assert report.predicted["l.plane_1"] == pytest.approx(expected, rel=1e-3)
    assert report.flips["l.plane_1"] == flipped.sum() > 20
    assert report.flip_rate == pytest.approx(flipped.double().mean().item())


@pytest.mark.parametrize("format_name", ACCUMULATOR_FORMATS)
def test_quantiles_are_in_thresholds_and_saturation_is_the_share_at_the_bound(format_name):
    _, optimizer = layer_and_optimizer(accumulator=format_name)
    (entry,), number_format = optimizer.accumulated, optimizer.format
    values = torch.zeros(M * N)
    values[: M * N // 4] = -0.75 * number_format.threshold  # a quarter, and a tenth of the others at the bound
    values[-(M * N // 10) :] = number_format.bound
    if entry.accumulator.dtype == torch.uint8:  # two weights a byte, the first in the lower half
        low, high = (values.view(-1, 2).to(torch.int16) & 15).unbind(1)
        entry.accumulator.copy_((low | high << 4).to(torch.uint8))
    else:
        entry.accumulator.copy_(values)
    (found,) = optimizer.accumulator_quantiles().values()
    bound = min(number_format.bound / number_format.threshold, 2 - 1 / 128)
    assert found[0] == 0 and found[3] == M * N // 10 / (M * N)
    assert found[1] == pytest.approx(0.75, abs=1 / 64)
    assert found[2] == pytest.approx(bound, abs=1 / 64)


@pytest.mark.parametrize(("guard", "waits"), [(0.0, 0), (0.5, 1)])
def test_a_guarded_bit_waits_before_it_flips_back(guard, waits):
    """A signal of a threshold a step, reversed after the step in which a tenth of the bits flips."""
    layer, optimizer = layer_and_optimizer(1, signal="raw", step_size=1.0, guard=guard)
    layer.scale_out.data.fill_(1.0)
    layer.scale_in.data.fill_(1.0)
    start = torch.where(torch.rand(M, N) < 0.1, 1.0, -1.0).double()
    layer.planes[0].data.copy_(pack_signs(start.float()))
    x, dy = torch.ones(1, N), torch.full((1, M), 2.0)
    one_step(layer, optimizer, x, dy)
    mine = start > 0
    assert (signs_of_last_plane(layer)[mine] < 0).all()
    for _ in range(waits):
        assert one_step(layer, optimizer, x, -dy).total() == 0
    report = one_step(layer, optimizer, x, -dy)
    assert (signs_of_last_plane(layer)[mine] > 0).all()
    assert report.flipped_back["l.plane_0"] == mine.sum() > 100

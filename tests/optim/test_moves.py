import itertools

import pytest
import torch

from mbdist.optim.moves import bit_moves, level_moves
from mbdist_kernels import pack_signs, unpack_signs


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
def test_a_move_goes_to_the_next_level_downhill(num_planes):
    """Against a search in Python over every element: target level, rank, flipped bits."""
    generator = torch.Generator().manual_seed(num_planes)
    m, n, row = 6, 40, 64
    planes = [pack_signs(torch.randn(m, n, generator=generator)) for _ in range(num_planes)]
    scale_out = torch.rand(num_planes, m, generator=generator) + 0.5
    scale_in = torch.rand(num_planes, n, generator=generator) - 0.2  # some scales are negative
    first_row = 2  # the owner's part: rows 2 .. 5
    signs = torch.stack([unpack_signs(plane, n) for plane in planes])
    scales = scale_out[:, :, None] * scale_in[:, None, :]
    elements, values, expected = [], [], []
    for i, j in itertools.product(range(first_row, m), range(n)):
        value = (7 * i + 13 * j) % 127 - 63
        value += 64 if value >= 0 else -64
        elements.append((i - first_row) * row + j)
        values.append(value)
        current = (signs[:, i, j] * scales[:, i, j]).sum().item()
        found = None
        for pattern in itertools.product((1.0, -1.0), repeat=num_planes):
            step = ((torch.tensor(pattern) * scales[:, i, j]).sum().item() - current) * (-1 if value > 0 else 1)
            if step > 1e-5 and (found is None or step < found[0]):
                found = (step, [int(a != b) for a, b in zip(pattern, signs[:, i, j].tolist(), strict=True)])
        if found is None:
            continue
        rank = min(127.0, abs(value) * 2 * scales[-1, i, j].abs().item() / found[0])
        if rank >= 64:
            expected.append((elements[-1], int(rank + 1e-4), sum(bit << k for k, bit in enumerate(found[1]))))
    assert len(expected) > 20
    words = [plane[first_row:].flatten() for plane in planes]
    found = level_moves(
        torch.tensor(elements, dtype=torch.int32),
        torch.tensor(values, dtype=torch.int8),
        words,
        scale_out,
        scale_in,
        first_row * row,
        row,
    )
    close = list(zip(found.elements.tolist(), found.flipped.tolist(), strict=True))
    assert close == [(element, flipped) for element, _, flipped in expected]
    assert (found.ranks - torch.tensor([rank for _, rank, _ in expected])).abs().max() <= 1  # rounding


def test_one_plane_makes_the_same_move_either_way():
    plane = pack_signs(torch.randn(4, 32)).flatten()
    elements = torch.arange(0, 128, 3, dtype=torch.int32)
    signs = unpack_signs(plane[None], 128)[0][elements.long()]
    values = (signs * 80).to(torch.int8)  # v * B = 80: every bit wants to flip
    ones = torch.ones(1, 4), torch.ones(1, 32)
    levels = level_moves(elements, values, [plane], *ones, 0, 32)
    bits = bit_moves(elements, values, 0)
    for name in ("elements", "values", "ranks", "flipped", "steps"):
        assert torch.equal(getattr(levels, name), getattr(bits, name)), name
    assert len(level_moves(elements, -values, [plane], *ones, 0, 32).elements) == 0, "no level further that way"


def test_two_planes_cross_zero_by_flipping_both():
    words = [torch.tensor([0b01], dtype=torch.int32), torch.tensor([0b10], dtype=torch.int32)]  # -1 + .5 and 1 - .5
    scale_out, scale_in = torch.tensor([[1.0], [0.5]]), torch.ones(2, 32)
    elements, values = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([-64, 64], dtype=torch.int8)
    found = level_moves(elements, values, words, scale_out, scale_in, 0, 32)
    assert found.flipped.tolist() == [0b11, 0b11]
    assert found.ranks.tolist() == [64, 64]
    assert found.steps.tolist() == [1.0, -1.0], "from -.5 to .5 and back, in units of 2 |s_last| = 1"

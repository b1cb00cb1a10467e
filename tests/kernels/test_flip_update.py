import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbdist_kernels import (
    ACCUMULATOR_FORMATS,
    FIXED_ONE,
    THRESHOLD,
    accumulate_signal,
    draw_tickets,
    find_candidates,
    flip_mask,
    fold_key,
    pack_signs,
    popcount,
    random_bits,
    unpack_signs,
)


def lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def oracle(m: int, signal: float, beta_q15: int, limit: float, key: int, element: int) -> int:
    """One element in plain Python integers."""
    limit_q = round(limit * THRESHOLD * FIXED_ONE)
    wanted = float(np.float32(signal) * np.float32(THRESHOLD * FIXED_ONE))
    wanted = 0.0 if wanted != wanted else min(max(wanted, -limit_q), limit_q)
    mixed = lowbias32(((element // 2) * 0x9E3779B9 + key) & 0xFFFFFFFF)
    r = mixed & 0x7FFF if element % 2 == 0 else mixed >> 17
    return max(-127, min(127, (m * beta_q15 + round(wanted) + r) >> 15))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(0, FIXED_ONE), st.floats(0.001, 1), st.integers(0, 2**28))
def test_accumulate_equals_plain_integers(implementation, seed, beta_q15, limit, first_word):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-127, 128, (64,), dtype=torch.int8, generator=generator)
    signals = torch.randn(2, 64, generator=generator)
    signals[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    keys = [fold_key(seed, 1), fold_key(seed, 2)]
    expected = []
    for e in range(64):
        m = int(start[e])
        for c, beta in enumerate((beta_q15, FIXED_ONE)):
            m = oracle(m, float(signals[c, e]), beta, limit, keys[c], first_word * 32 + e)
        expected.append(m)
    accumulator = start.clone()
    accumulate_signal(accumulator, signals, beta_q15, limit, keys, first_word * 32)
    assert accumulator.tolist() == expected


def test_accumulate_is_the_same_for_any_cut(implementation):
    signal = torch.randn(1, 320) * 0.1
    whole = torch.zeros(320, dtype=torch.int8)
    accumulate_signal(whole, signal, FIXED_ONE, 1.0, [7], 0)
    for cut in (32, 96, 288):
        parts = torch.zeros(320, dtype=torch.int8)
        accumulate_signal(parts[:cut], signal[:, :cut], FIXED_ONE, 1.0, [7], 0)
        accumulate_signal(parts[cut:], signal[:, cut:], FIXED_ONE, 1.0, [7], cut)
        assert torch.equal(whole, parts)


def test_stochastic_rounding_is_unbiased(implementation):
    draws, signal = 1 << 17, 0.3 / THRESHOLD  # 0.3 units: rounds to 0 or 1
    accumulator = torch.zeros(draws, dtype=torch.int8)
    accumulate_signal(accumulator, torch.full((1, draws), signal), FIXED_ONE, 1.0, [fold_key(3)], 0)
    sigma = (0.3 * 0.7 / draws) ** 0.5
    assert abs(accumulator.double().mean() - 0.3) < 5 * sigma


def test_nothing_moves_without_decay_and_signal(implementation):
    start = torch.randint(-127, 128, (256,), dtype=torch.int8)
    accumulator = start.clone()
    accumulate_signal(accumulator, torch.zeros(3, 256), FIXED_ONE, 1.0, [1, 2, 3], 64)
    assert torch.equal(accumulator, start)


def test_random_bits_are_uniform():
    r = random_bits(fold_key(1, 2, 3), torch.arange(1 << 16))
    assert int(r.min()) >= 0 and int(r.max()) < FIXED_ONE
    for shift in (0, 7, 14):
        ones = ((r >> shift) & 1).sum().item()
        assert abs(ones - 32768) < 5 * 128
    counts = torch.bincount((r >> 10).long(), minlength=32).double()
    chi_square = ((counts - 2048) ** 2 / 2048).sum()
    assert chi_square < 31 + 5 * (62**0.5)


def setting(seed=0, words=40):
    generator = torch.Generator().manual_seed(seed)
    accumulator = torch.randint(-127, 128, (words * 32,), dtype=torch.int8, generator=generator)
    plane = pack_signs(torch.randn(1, words * 32, generator=generator)).flatten()
    rank = accumulator.int() * unpack_signs(plane[None], words * 32, torch.int32)[0]
    return accumulator, plane, rank


@pytest.mark.parametrize("form", ["int8", "int4", "fp32"])
def test_find_candidates(implementation, form):
    form = ACCUMULATOR_FORMATS[form]
    accumulator, plane, _ = setting()
    accumulator = accumulator if form.bound == 127 else (accumulator / (127 / form.bound)).to(form.dtype)
    signs = unpack_signs(plane[None], len(accumulator), torch.float32)[0]
    for words, rank in ((plane, accumulator * signs), (None, accumulator.float().abs())):
        elements, values = find_candidates(accumulator, words, form)
        expected = (rank >= form.threshold).nonzero().flatten()
        assert 0 < len(expected) < len(accumulator) / 1.5
        assert torch.equal(elements.long(), expected)
        in_units = (accumulator[expected].float() * (64 / form.threshold)).clamp(-127, 127)
        assert torch.equal(values, in_units.to(torch.int8))
        assert (values.int().abs() >= THRESHOLD).all()


def test_flip_mask_sets_these_bits_and_no_others():
    elements = torch.tensor([0, 31, 32, 70, 95], dtype=torch.int32)
    mask = flip_mask(elements, 4)
    assert torch.equal((unpack_signs(mask[None], 128)[0] < 0).nonzero().flatten(), elements.long())
    assert popcount(mask) == 5 and popcount(flip_mask(elements[:0], 4)) == 0


def test_int4_keeps_its_bounds(implementation):
    accumulator = torch.zeros(64, dtype=torch.int8)
    signal = torch.ones(1, 64)
    for step, expected in enumerate((4, 7, 7)):  # the threshold is 4, the bound 7
        accumulate_signal(accumulator, signal, FIXED_ONE, 1.0, [step], 0, ACCUMULATOR_FORMATS["int4"])
        assert (accumulator == expected).all()


def test_fp32_accumulates_what_it_is_given():
    accumulator = torch.zeros(64)
    signals = torch.stack([torch.full((64,), 0.25), torch.full((64,), 5.0)])
    signals[0, 0] = torch.nan
    accumulate_signal(accumulator, signals, FIXED_ONE // 2, 0.5, [1, 2], 0, ACCUMULATOR_FORMATS["fp32"])
    assert accumulator[0] == 0.5 and (accumulator[1:] == 0.75).all()


def test_tickets_are_drawn_by_global_element():
    elements = torch.arange(5000)
    tickets = draw_tickets(11, elements)
    assert torch.equal(tickets[1234:], draw_tickets(11, elements[1234:]))
    assert tickets.unique().numel() == 64

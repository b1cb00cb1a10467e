import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbdist_kernels import (
    FIXED_ONE,
    THRESHOLD,
    accumulate_signal,
    count_candidates,
    draw_tickets,
    find_candidates,
    fold_key,
    native,
    pack_signs,
    popcount,
    random_bits,
    select_flips,
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


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, FIXED_ONE), st.floats(0.001, 1), st.integers(0, 1000))
def test_accumulate_equals_plain_integers(seed, beta_q15, limit, first_word):
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
    for use_native in (False, True):
        if use_native and native.accelerator() is None:
            continue
        serves, native.serves = native.serves, native.serves if use_native else lambda *t: False
        try:
            accumulator = start.clone()
            accumulate_signal(accumulator, signals, beta_q15, limit, keys, first_word * 32)
        finally:
            native.serves = serves
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


def test_count_and_find_candidates(implementation):
    accumulator, plane, rank = setting()
    histogram = count_candidates(accumulator, plane)
    for level in range(THRESHOLD, 128):
        assert int(histogram[level - THRESHOLD]) == int((rank == level).sum())
    assert torch.equal(find_candidates(accumulator, plane, 80), (rank == 80).nonzero().flatten())


@pytest.mark.parametrize("level", [64, 100, 127, 128])
def test_select_flips(implementation, level):
    accumulator, plane, rank = setting()
    before, words = accumulator.clone(), plane.clone()
    also = (rank == level - 1).nonzero().flatten()[:3]
    mask = select_flips(accumulator, plane, level, also)
    expected = rank >= level
    expected[also] = True
    assert torch.equal(unpack_signs(mask[None], len(rank))[0] < 0, expected)
    assert torch.equal(accumulator, before.masked_fill(expected, 0))
    assert torch.equal(plane, words)
    assert popcount(mask) == int(expected.sum())


def test_tickets_are_drawn_by_global_element():
    elements = torch.arange(5000)
    tickets = draw_tickets(11, elements)
    assert torch.equal(tickets[1234:], draw_tickets(11, elements[1234:]))
    assert tickets.unique().numel() == 64

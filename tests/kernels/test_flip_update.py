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
    accumulated_at,
    accumulated_values,
    draw_tickets,
    find_candidates,
    flip_mask,
    fold_key,
    pack_signs,
    popcount,
    random_bits,
    set_accumulated,
    unpack_signs,
)
from mbdist_kernels.accumulator import in_pairs

FIXED_POINT = {name: form for name, form in ACCUMULATOR_FORMATS.items() if name != "fp32"}


def stored(values, form):
    """Whole numbers, one a weight, as this format keeps them."""
    return in_pairs(values.int()) if form.per_entry == 2 else values.to(form.dtype)


def random_values(form, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-form.bound, form.bound + 1, (count,), generator=generator)


def lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def oracle(form, m: int, signal: float, beta_q15: int, limit: float, key: int, element: int) -> int:
    """One element in plain Python integers."""
    limit_q = round(limit * form.threshold * FIXED_ONE)
    wanted = np.float32(signal).item() * form.threshold * FIXED_ONE if np.isfinite(signal) else 0.0
    wanted = min(max(wanted, -limit_q), limit_q)
    mixed = lowbias32(((element // 2) * 0x9E3779B9 + key) & 0xFFFFFFFF)
    r = mixed & 0x7FFF if element % 2 == 0 else mixed >> 17
    return max(-form.bound, min(form.bound, (m * beta_q15 + round(wanted) + r) >> 15))


@pytest.mark.filterwarnings("ignore:overflow")  # of what is clamped afterwards, by numpy in the interpreter
@pytest.mark.parametrize("form", FIXED_POINT.values(), ids=FIXED_POINT)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(0, FIXED_ONE), st.floats(0.001, 1), st.integers(0, 2**28))
def test_accumulate_equals_plain_integers(implementation, form, seed, beta_q15, limit, first_word):
    generator = torch.Generator().manual_seed(seed)
    start = random_values(form, 64, seed)
    signals = torch.randn(2, 64, generator=generator)
    signals[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3e38, -3e38])
    keys = [fold_key(seed, 1), fold_key(seed, 2)]
    expected = []
    for e in range(64):
        m = int(start[e])
        for c, beta in enumerate((beta_q15, FIXED_ONE)):
            m = oracle(form, m, float(signals[c, e]), beta, limit, keys[c], first_word * 32 + e)
        expected.append(m)
    accumulator = stored(start, form)
    accumulate_signal(accumulator, signals, beta_q15, limit, keys, first_word * 32, form)
    assert accumulated_values(accumulator).tolist() == expected


@pytest.mark.parametrize("form", FIXED_POINT.values(), ids=FIXED_POINT)
def test_accumulate_is_the_same_for_any_cut(implementation, form):
    signal = torch.randn(1, 320) * 0.1
    whole = form.zeros(320)
    accumulate_signal(whole, signal, FIXED_ONE, 1.0, [7], 0, form)
    for cut in (32, 96, 288):
        parts = form.zeros(320)
        before, after = parts.tensor_split([cut // form.per_entry])
        accumulate_signal(before, signal[:, :cut], FIXED_ONE, 1.0, [7], 0, form)
        accumulate_signal(after, signal[:, cut:], FIXED_ONE, 1.0, [7], cut, form)
        assert torch.equal(whole, parts) and parts.any()


@pytest.mark.parametrize("form", FIXED_POINT.values(), ids=FIXED_POINT)
def test_stochastic_rounding_is_unbiased(implementation, form):
    draws, signal = 1 << 17, 0.3 / form.threshold  # 0.3 units: rounds to 0 or 1
    accumulator = form.zeros(draws)
    accumulate_signal(accumulator, torch.full((1, draws), signal), FIXED_ONE, 1.0, [fold_key(3)], 0, form)
    sigma = (0.3 * 0.7 / draws) ** 0.5
    assert abs(accumulated_values(accumulator).double().mean() - 0.3) < 5 * sigma


@pytest.mark.parametrize("form", FIXED_POINT.values(), ids=FIXED_POINT)
def test_nothing_moves_without_decay_and_signal(implementation, form):
    start = stored(random_values(form, 256), form)
    accumulator = start.clone()
    accumulate_signal(accumulator, torch.zeros(3, 256), FIXED_ONE, 1.0, [1, 2, 3], 64, form)
    assert torch.equal(accumulator, start)


def test_two_weights_share_a_byte():
    assert in_pairs(torch.tensor([3, -2], dtype=torch.int32)).tolist() == [0xE3]
    form = ACCUMULATOR_FORMATS["int4"]
    assert form.zeros(1 << 20).nbytes == 1 << 19
    assert accumulated_values(stored(torch.arange(-8, 8), form)).tolist() == list(range(-8, 8))


@pytest.mark.parametrize("form", ACCUMULATOR_FORMATS.values(), ids=ACCUMULATOR_FORMATS)
def test_some_accumulators_are_set_and_their_neighbours_stay(form):
    values = random_values(form, 640)
    accumulator = stored(values, form)
    elements = torch.randperm(640)[:300].int()  # many a pair of one byte
    values[elements.long()] = random_values(form, 300, seed=1)
    set_accumulated(accumulator, elements, values[elements.long()] + 0.3)
    if form.dtype == torch.float32:
        values = values + 0.3 * torch.zeros(640).index_fill(0, elements.long(), 1)
    assert torch.equal(accumulated_values(accumulator).float(), values.float())
    assert torch.equal(accumulated_at(accumulator, elements).float(), values[elements.long()].float())


def test_random_bits_are_uniform():
    r = random_bits(fold_key(1, 2, 3), torch.arange(1 << 16))
    assert int(r.min()) >= 0 and int(r.max()) < FIXED_ONE
    for shift in (0, 7, 14):
        ones = ((r >> shift) & 1).sum().item()
        assert abs(ones - 32768) < 5 * 128
    counts = torch.bincount((r >> 10).long(), minlength=32).double()
    chi_square = ((counts - 2048) ** 2 / 2048).sum()
    assert chi_square < 31 + 5 * (62**0.5)


@pytest.mark.parametrize("form", ACCUMULATOR_FORMATS.values(), ids=ACCUMULATOR_FORMATS)
def test_find_candidates(implementation, form):
    count = 130 * 32  # several blocks of words, the last one ragged
    start = random_values(form, count)
    start[64:4096] = start[64:4096].div(3, rounding_mode="trunc")  # blocks without a candidate
    accumulator, plane = stored(start, form), pack_signs(torch.randn(1, count)).flatten()
    signs = unpack_signs(plane[None], count, torch.int32)[0]
    for words, rank in ((plane, start * signs), (None, start.abs())):
        elements, values = find_candidates(accumulator, words, form)
        expected = (rank >= form.threshold).nonzero().flatten()
        assert 0 < len(expected) < 128
        assert torch.equal(elements.long(), expected)
        in_units = (start[expected] * (64 // form.threshold)).clamp(-127, 127)
        assert torch.equal(values, in_units.to(torch.int8))
        assert (values.int().abs() >= THRESHOLD).all()


def test_flip_mask_sets_these_bits_and_no_others(implementation):
    elements = torch.tensor([0, 31, 32, 70, 95], dtype=torch.int32)
    mask = flip_mask(elements, 4)
    assert torch.equal((unpack_signs(mask[None], 128)[0] < 0).nonzero().flatten(), elements.long())
    assert popcount(mask) == 5 and popcount(flip_mask(elements[:0], 4)) == 0


def test_int4_keeps_its_bounds(implementation):
    form = ACCUMULATOR_FORMATS["int4"]
    accumulator, signal = form.zeros(64), torch.ones(1, 64)
    for step, expected in enumerate((4, 7, 7)):  # the threshold is 4, the bound 7
        accumulate_signal(accumulator, signal, FIXED_ONE, 1.0, [step], 0, form)
        assert (accumulated_values(accumulator) == expected).all()


def test_fp32_accumulates_what_it_is_given():
    accumulator = torch.zeros(64)
    signals = torch.stack([torch.full((64,), 0.25), torch.full((64,), 5.0)])
    signals[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    accumulate_signal(accumulator, signals, FIXED_ONE // 2, 0.5, [1, 2], 0, ACCUMULATOR_FORMATS["fp32"])
    assert (accumulator[:3] == 0.5).all() and (accumulator[3:] == 0.75).all()


def test_tickets_are_drawn_by_global_element():
    elements = torch.arange(5000)
    tickets = draw_tickets(11, elements)
    assert torch.equal(tickets[1234:], draw_tickets(11, elements[1234:]))
    assert tickets.unique().numel() == 64

"""The Boolean optimizer's arithmetic on packed bits: integer, in a fixed order, the same for any sharding.

State of a matrix: one accumulator a weight, fixed-point, in an int8. In the format INT8 its unit is 1/64 of the flip
threshold: 64 is the threshold, and the octave from 64 to 127 only ranks bits that wait because the step's cap was
reached. INT4 has the unit 1/4 and the range -7 .. 7. A contribution g (one micro-batch of one rank) moves it by

    v = clamp((m * beta_q15 + clamp(rint(signal * unit * 2^15), -limit, limit) + r) >> 15, -bound, bound)

with r uniform in [0, 2^15): stochastic rounding, so small steps are not lost. A bit flips where ``v * B`` reaches the
threshold (method: "M * B >= 1", BOLD, arXiv 2405.16339, algorithm 8). A fp32 accumulator in units of the threshold is
accepted everywhere too, as the reference that says what fixed point costs.

Elements are counted in the packed layout, padding included: element e is bit e % 32 of word e // 32.
Worked example: m = 10, beta = 1, signal = +0.25 gives (10 * 32768 + 0.25 * 64 * 32768 + r) >> 15 = 26 for every r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbdist_kernels import native
from mbdist_kernels.layout import WORD_BITS, unpack_bits
from mbdist_kernels.random import random_bits

FIXED_ONE = 1 << 15  # Q15
THRESHOLD = 64  # ranks of flip candidates go from here ..
TOP_RANK = 127  # .. to here, in every format
LOTTERY_TICKETS = 64  # buckets of the draw among candidates of equal rank


@dataclass(frozen=True)
class AccumulatorFormat:
    """How an accumulator is stored: ``threshold`` units are one threshold, values lie within +-``bound``."""

    dtype: torch.dtype
    threshold: int
    bound: int


INT8 = AccumulatorFormat(torch.int8, 64, 127)
INT4 = AccumulatorFormat(torch.int8, 4, 7)
FP32 = AccumulatorFormat(torch.float32, 1, 2)
ACCUMULATOR_FORMATS = {"int8": INT8, "int4": INT4, "fp32": FP32}


def accumulate_signal(
    accumulator: torch.Tensor,  # (E,) of the format's dtype, changed in place
    signals: torch.Tensor,  # (C, E) fp32: C contributions in the order in which they count; units of the threshold
    beta_q15: int,  # decay, applied once, before the first contribution
    limit: float,  # most that one contribution may add, units of the threshold
    keys: list[int],  # C keys, one a contribution
    first_element: int,  # global index of accumulator[0]; a multiple of 32
    form: AccumulatorFormat = INT8,
) -> None:
    """Add contributions with stochastic rounding. A signal that is not a number counts as 0."""
    if form.dtype.is_floating_point:
        for signal in signals:
            accumulator.mul_(beta_q15 / FIXED_ONE).add_(signal.nan_to_num(0.0).clamp(-limit, limit))
            accumulator.clamp_(-form.bound, form.bound)
            beta_q15 = FIXED_ONE
        return
    unit = form.threshold * FIXED_ONE
    limit_q = round(limit * unit)
    if native.serves(signals, accumulator):
        native.accumulate_signal(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, form.bound)
        return
    for signal, key in zip(signals, keys, strict=True):
        wanted = (signal * float(unit)).nan_to_num(0.0).clamp(-limit_q, limit_q).round().int()
        elements = torch.arange(first_element, first_element + signal.numel(), device=signal.device)
        moved = (accumulator.int() * beta_q15 + wanted + random_bits(key, elements)) >> 15
        accumulator.copy_(moved.clamp(-form.bound, form.bound))
        beta_q15 = FIXED_ONE


def find_candidates(
    accumulator: torch.Tensor,  # (E,) of the format's dtype
    words: torch.Tensor | None,  # (E / 32,) int32: the plane's bits of the same elements
    form: AccumulatorFormat = INT8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(elements int32 (C,), in order; their accumulators in units of 1/64: int8 (C,)) of all elements where v * B
    reaches the threshold, or |v| where no words are given."""
    if native.serves(accumulator) and accumulator.dtype == torch.int8:
        found, values = native.find_candidates(accumulator, words, form.threshold)
    else:
        rank = accumulator.float()  # int8 would wrap in a comparison with 128
        rank = rank.abs() if words is None else torch.where(unpack_bits(words.reshape(1, -1))[0], -rank, rank)
        found = (rank >= form.threshold).nonzero().flatten().int()
        values = accumulator[found]
    in_units = values * (THRESHOLD / form.threshold)
    return found, in_units.clamp(-TOP_RANK, TOP_RANK).to(torch.int8)


def draw_tickets(
    key: int,
    elements: torch.Tensor,  # int64, global indices
) -> torch.Tensor:
    """A lottery ticket in [0, 64) for every element, to choose among candidates of equal rank: int64."""
    return (random_bits(key, elements) % LOTTERY_TICKETS).long()


def flip_mask(
    elements: torch.Tensor,  # (C,) int32, distinct
    num_words: int,
) -> torch.Tensor:
    """int32 (num_words,): bit 1 at these elements. Applying it is an XOR."""
    mask = torch.zeros(num_words, dtype=torch.int32, device=elements.device)
    bits = torch.ones_like(elements) << (elements % WORD_BITS)
    return mask.index_add_(0, elements // WORD_BITS, bits)  # bits are disjoint, so a wrapping sum is an or

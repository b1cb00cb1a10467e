"""The Boolean optimizer's arithmetic on packed bits: integer, in a fixed order, the same for any sharding.

State of a trained plane: one int8 accumulator a weight in units of 1/64 of the flip threshold. 64 is the threshold; the
octave from 64 to 127 only ranks bits that wait because the step's cap was reached. A contribution g (one micro-batch of
one rank) moves it by

    v = clamp((m * beta_q15 + clamp(rint(signal * 64 * 2^15), -limit, limit) + r) >> 15, -127, 127)

with r uniform in [0, 2^15): stochastic rounding, so small steps are not lost. A bit flips where ``v * B >= 64``
(method: "M * B >= 1", BOLD, arXiv 2405.16339, algorithm 8).

Elements are counted in the packed layout, padding included: element e is bit e % 32 of word e // 32.
Worked example: m = 10, beta = 1, signal = +0.25 gives (10 * 32768 + 0.25 * 64 * 32768 + r) >> 15 = 26 for every r.
"""

from __future__ import annotations

import torch

from mbdist_kernels import native
from mbdist_kernels.layout import WORD_BITS, unpack_bits
from mbdist_kernels.random import random_bits

THRESHOLD = 64
FIXED_ONE = 1 << 15  # Q15
LEVELS = 128 - THRESHOLD  # accumulator values at or above the threshold: the ranks of a flip candidate
LOTTERY_TICKETS = 64  # buckets of the draw among candidates of equal rank


def accumulate_signal(
    accumulator: torch.Tensor,  # (E,) int8, changed in place
    signals: torch.Tensor,  # (C, E) fp32: C contributions in the order in which they count; units of the threshold
    beta_q15: int,  # decay, applied once, before the first contribution
    limit: float,  # most that one contribution may add, units of the threshold
    keys: list[int],  # C keys, one a contribution
    first_element: int,  # global index of accumulator[0]; a multiple of 32
) -> None:
    """Add contributions with stochastic rounding. A signal that is not a number counts as 0."""
    limit_q = round(limit * THRESHOLD * FIXED_ONE)
    if native.serves(signals, accumulator):
        native.accumulate_signal(accumulator, signals, beta_q15, limit_q, keys, first_element)
        return
    for signal, key in zip(signals, keys, strict=True):
        wanted = (signal * float(THRESHOLD * FIXED_ONE)).nan_to_num(0.0).clamp(-limit_q, limit_q).round().int()
        elements = torch.arange(first_element, first_element + signal.numel(), device=signal.device)
        moved = (accumulator.int() * beta_q15 + wanted + random_bits(key, elements)) >> 15
        accumulator.copy_(moved.clamp(-127, 127))
        beta_q15 = FIXED_ONE


def _rank(accumulator: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """v * B of every element: int16 (E,); int8 would wrap in a comparison with 128."""
    negative = unpack_bits(words.reshape(1, -1))[0]
    return torch.where(negative, -accumulator, accumulator).short()


def count_candidates(
    accumulator: torch.Tensor,  # (E,) int8
    words: torch.Tensor,  # (E / 32,) int32: the plane's bits of the same elements
) -> torch.Tensor:
    """Histogram of v * B over the levels 64 .. 127: int64 (64,)."""
    if native.serves(accumulator):
        return native.count_candidates(accumulator, words)
    rank = _rank(accumulator, words)
    return torch.bincount(rank[rank >= THRESHOLD].long() - THRESHOLD, minlength=LEVELS)


def find_candidates(
    accumulator: torch.Tensor,  # (E,) int8
    words: torch.Tensor,  # (E / 32,) int32
    level: int,  # 64 .. 127
) -> torch.Tensor:
    """Elements with v * B exactly at this level, in order: int64 indices into ``accumulator``."""
    if native.serves(accumulator):
        return native.find_candidates(accumulator, words, level)
    return (_rank(accumulator, words) == level).nonzero().flatten()


def draw_tickets(
    key: int,
    elements: torch.Tensor,  # int64, global indices
) -> torch.Tensor:
    """A lottery ticket in [0, 64) for every element, to choose among candidates of equal rank: int64."""
    return (random_bits(key, elements) % LOTTERY_TICKETS).long()


def select_flips(
    accumulator: torch.Tensor,  # (E,) int8; set to 0 where a bit flips
    words: torch.Tensor,  # (E / 32,) int32, not changed
    level: int,  # 64 .. 128: every candidate at or above it flips
    also: torch.Tensor | None = None,  # int64 indices of further elements that flip, below the level
) -> torch.Tensor:
    """The flip mask: int32 (E / 32,), bit 1 where the sign is to change. Applying it is an XOR."""
    if native.serves(accumulator):
        mask = native.select_flips(accumulator, words, level)
    else:
        flip = _rank(accumulator, words) >= level
        accumulator.masked_fill_(flip, 0)
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
        mask = (flip.view(-1, WORD_BITS).int() << shifts).sum(-1, dtype=torch.int32)
    if also is not None and also.numel():
        accumulator[also] = 0
        bits = torch.ones_like(also, dtype=torch.int32) << (also % WORD_BITS).int()
        mask.index_add_(0, also // WORD_BITS, bits)  # bits are disjoint, so a wrapping sum is an or
    return mask

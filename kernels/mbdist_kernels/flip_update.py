"""The Boolean optimizer's arithmetic on packed bits: integer, in a fixed order, the same for any sharding.

State of a matrix: one accumulator a weight, stored as ``accumulator.py`` says. A contribution g (one micro-batch of one
rank) moves it by

    v = clamp((m * beta_q15 + clamp(rint(signal * unit * 2^15), -limit, limit) + r) >> 15, -bound, bound)

with r uniform in [0, 2^15): stochastic rounding, so small steps are not lost. A bit flips where ``v * B`` reaches the
threshold (method: "M * B >= 1", BOLD, arXiv 2405.16339, algorithm 8). A fp32 accumulator is not rounded.

Elements are counted in the packed layout, padding included: element e is bit e % 32 of word e // 32.
Worked example: m = 10, beta = 1, signal = +0.25 gives (10 * 32768 + 0.25 * 64 * 32768 + r) >> 15 = 26 for every r.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.accumulator import (
    INT8,
    AccumulatorFormat,
    accumulated_at,
    accumulated_values,
    in_pairs,
    weights_per_entry,
)
from mbdist_kernels.flip_mask import elements_of_mask
from mbdist_kernels.launch import settings
from mbdist_kernels.layout import WORD_BITS
from mbdist_kernels.pack import pack_signs
from mbdist_kernels.random import random_bits, random_bits_of_pairs
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_bits

FIXED_ONE = 1 << 15  # Q15
THRESHOLD = 64  # ranks of flip candidates go from here ..
TOP_RANK = 127  # .. to here, in every format
LOTTERY_TICKETS = 64  # buckets of the draw among candidates of equal rank


def accumulate_signal(
    accumulator: torch.Tensor,  # of E weights in this format, E a multiple of 32; changed in place
    signals: torch.Tensor,  # (C, E) fp32: C contributions in the order in which they count; units of the threshold
    beta_q15: int,  # decay, applied once, before the first contribution
    limit: float,  # most that one contribution may add, units of the threshold; below 2
    keys: list[int],  # C keys, one a contribution
    first_element: int,  # global index of the first weight; a multiple of 32
    form: AccumulatorFormat = INT8,
) -> None:
    """Add contributions with stochastic rounding. A signal that is not finite counts as 0."""
    if form.dtype.is_floating_point:
        for signal in signals:
            accumulator.mul_(beta_q15 / FIXED_ONE).add_(_finite(signal).clamp(-limit, limit))
            accumulator.clamp_(-form.bound, form.bound)
            beta_q15 = FIXED_ONE
        return
    unit = form.threshold * FIXED_ONE
    _accumulate(accumulator, signals, beta_q15, round(limit * unit), keys, first_element, unit, form.bound)


def _accumulate_cpu(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, bound):
    if native.serves(signals, accumulator):
        native.accumulate_signal(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, bound)
    else:
        accumulate_reference(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, bound)


def accumulate_reference(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, bound) -> None:
    """In plain torch: fixed-point accumulators; ``limit_q`` in units of 2^-15, ``unit`` of them to the threshold."""
    for signal, key in zip(signals, keys, strict=True):
        wanted = (_finite(signal) * float(unit)).clamp(-limit_q, limit_q).round().int()
        elements = torch.arange(first_element, first_element + signal.numel(), device=signal.device)
        moved = (accumulated_values(accumulator).int() * beta_q15 + wanted + random_bits(key, elements)) >> 15
        moved = moved.clamp(-bound, bound)
        accumulator.copy_(moved if weights_per_entry(accumulator.dtype) == 1 else in_pairs(moved))
        beta_q15 = FIXED_ONE


def _finite(signal: torch.Tensor) -> torch.Tensor:
    """0 where the signal is not finite: the step will be skipped, and its contributions cannot be taken back."""
    return signal.nan_to_num(0.0, posinf=0.0, neginf=0.0)


def accumulate_triton(accumulator, signals, beta_q15, limit_q, keys, first_element, unit, bound) -> None:
    """On a GPU; arguments as in ``accumulate_reference``."""
    elements = signals.shape[1]
    chosen = settings("flip_update")
    if not elements:
        return
    _accumulate_kernel[(-(-elements // chosen["BLOCK"]),)](
        accumulator,
        signals.contiguous(),
        _keys_on_device(tuple(keys), signals.device),
        elements,
        first_element // 2,
        beta_q15,
        limit_q,
        bound,
        PAIRS=weights_per_entry(accumulator.dtype) == 2,
        UNIT=float(unit),
        CONTRIBUTIONS=len(signals),
        enable_fp_fusion=False,
        **chosen,
    )


@functools.lru_cache(maxsize=8)  # the same in a captured graph as outside
def _keys_on_device(keys: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """As int32 bits: torch has next to no unsigned arithmetic."""
    return torch.tensor(keys, dtype=torch.int64).to(torch.int32).to(device)


# What changes from step to step must not select another binary: a rank would stop to compile it.
@triton.jit(do_not_specialize=["first_pair", "beta_q15", "limit_q", "bound"])
def _accumulate_kernel(
    accumulator,  # (E,) int8, or (E / 2,) uint8
    signals,  # (C, E) fp32
    keys,  # (C,) int32
    num_elements,
    first_pair,
    beta_q15,
    limit_q,
    bound,
    PAIRS: tl.constexpr,
    UNIT: tl.constexpr,
    CONTRIBUTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < num_elements
    pair_at = start // 2 + tl.arange(0, BLOCK // 2)
    pair = first_pair + pair_at
    if PAIRS:
        both = tl.load(accumulator + pair_at, mask=2 * pair_at < num_elements, other=0).to(tl.int32)
        state = tl.join((both << 28) >> 28, (both << 24) >> 28).reshape(BLOCK)
    else:
        state = tl.load(accumulator + at, mask=inside, other=0).to(tl.int32)
    limit = limit_q.to(tl.float32)
    beta = beta_q15
    for c in tl.static_range(CONTRIBUTIONS):
        signal = tl.load(signals + c * tl.cast(num_elements, tl.int64) + at, mask=inside, other=0.0)
        signal = tl.where(tl.abs(signal) < float("inf"), signal, 0.0)  # not so of a NaN either
        wanted = signal * UNIT
        wanted = tl.minimum(tl.maximum(wanted, -limit), limit)
        # Round to nearest even by the magic number 1.5 * 2^23, as |wanted| < 2^22.
        whole = ((wanted + 12582912.0) - 12582912.0).to(tl.int32)
        random = random_bits_of_pairs(tl.load(keys + c).to(tl.uint32, bitcast=True), pair).reshape(BLOCK)
        state = (state * beta + whole + random) >> 15
        state = tl.minimum(tl.maximum(state, -bound), bound)
        beta = 32768
    if PAIRS:
        lower, upper = state.reshape(BLOCK // 2, 2).split()
        tl.store(accumulator + pair_at, ((lower & 15) | (upper << 4)).to(tl.uint8), mask=2 * pair_at < num_elements)
    else:
        tl.store(accumulator + at, state.to(tl.int8), mask=inside)


_accumulate = operation(
    "accumulate_signal(Tensor(a!) accumulator, Tensor signals, int beta_q15, int limit_q, int[] keys, "
    "int first_element, int unit, int bound) -> ()",
    cpu=_accumulate_cpu,
    cuda=accumulate_triton,
    fake=lambda *arguments: None,
)


def find_candidates(
    accumulator: torch.Tensor,  # of E weights in this format
    words: torch.Tensor | None,  # (E / 32,) int32: the plane's bits of the same elements
    form: AccumulatorFormat = INT8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(elements int32 (C,), in order; their accumulators in units of 1/64: int8 (C,)) of all elements where v * B
    reaches the threshold, or |v| where no words are given."""
    if native.serves(accumulator) and not accumulator.dtype.is_floating_point:
        found, values = native.find_candidates(accumulator, words, form.threshold)
    else:
        found = elements_of_mask(candidate_mask(accumulator, words, form))
        values = accumulated_at(accumulator, found)
    in_units = values * (THRESHOLD / form.threshold)
    return found, in_units.clamp(-TOP_RANK, TOP_RANK).to(torch.int8)


def candidate_mask(
    accumulator: torch.Tensor, words: torch.Tensor | None, form: AccumulatorFormat = INT8
) -> torch.Tensor:
    """Bit 1 at the elements that ``find_candidates`` names: int32 (E / 32,)."""
    return _candidate_mask(accumulator, words, form.threshold)


def candidate_mask_reference(accumulator: torch.Tensor, words: torch.Tensor | None, threshold: int) -> torch.Tensor:
    """In plain torch."""
    rank = accumulated_values(accumulator).float()  # int8 would wrap in a comparison with 128
    rank = rank.abs() if words is None else torch.where(unpack_bits(words.reshape(1, -1))[0], -rank, rank)
    return pack_signs(torch.where(rank >= threshold, -1.0, 1.0)[None])[0]


def candidate_mask_triton(accumulator: torch.Tensor, words: torch.Tensor | None, threshold: int) -> torch.Tensor:
    """On a GPU: one pass over accumulators and words."""
    num_words = accumulator.numel() * weights_per_entry(accumulator.dtype) // WORD_BITS
    mask = torch.empty(num_words, dtype=torch.int32, device=accumulator.device)
    chosen = settings("candidate_mask")
    if num_words:
        _candidate_kernel[(-(-num_words // chosen["BLOCK_WORDS"]),)](
            accumulator,
            mask if words is None else words.contiguous(),
            mask,
            num_words,
            threshold,
            PAIRS=weights_per_entry(accumulator.dtype) == 2,
            BY_SIZE=words is None,
            **chosen,
        )
    return mask


@triton.jit
def _candidate_kernel(
    accumulator,  # (E,) int8 or fp32, or (E / 2,) uint8
    words,  # (E / 32,)
    mask,  # (E / 32,)
    num_words,
    threshold,
    PAIRS: tl.constexpr,
    BY_SIZE: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = word < num_words
    shift = tl.arange(0, 32)
    if PAIRS:
        at = word[:, None] * 16 + tl.arange(0, 16)[None, :]
        both = tl.load(accumulator + at, mask=inside[:, None], other=0).to(tl.int32)
        values = tl.join((both << 28) >> 28, (both << 24) >> 28).reshape(BLOCK_WORDS, 32)
    else:
        at = word[:, None] * 32 + shift[None, :]
        values = tl.load(accumulator + at, mask=inside[:, None], other=0)
    rank = values.to(tl.float32)
    if BY_SIZE:
        rank = tl.abs(rank)
    else:
        packed = tl.load(words + word, mask=inside, other=0)
        rank = tl.where((packed[:, None] >> shift[None, :]) & 1 == 1, -rank, rank)
    found = tl.sum((rank >= threshold).to(tl.int32) << shift[None, :], 1)
    tl.store(mask + word, found, mask=inside)


_candidate_mask = operation(
    "candidate_mask(Tensor accumulator, Tensor? words, int threshold) -> Tensor",
    cpu=candidate_mask_reference,
    cuda=candidate_mask_triton,
    fake=lambda accumulator, words, threshold: accumulator.new_empty(
        accumulator.numel() * weights_per_entry(accumulator.dtype) // WORD_BITS, dtype=torch.int32
    ),
)


def draw_tickets(
    key: int,
    elements: torch.Tensor,  # int64, global indices
) -> torch.Tensor:
    """A lottery ticket in [0, 64) for every element, to choose among candidates of equal rank: int64."""
    return (random_bits(key, elements) % LOTTERY_TICKETS).long()

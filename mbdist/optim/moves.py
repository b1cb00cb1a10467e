"""What a flip candidate may flip: one bit of one plane, or all the bits that take a weight to its next level.

With K planes a weight stands on one of 2^K levels. Flipping the bit of one plane moves it by twice that plane's scale,
so with the last plane alone (the paper's choice) a weight never leaves its half of the line: its sign belongs to the
first plane. A move to the next level up or down may flip several bits at once, and needs one accumulator a weight
whatever K is: the direction is that of -dL/dW, the step is the distance to the next level there (ours).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mbdist_kernels import THRESHOLD, TOP_RANK, bits_at


@dataclass
class Candidates:
    """Elements that may move in this step, and how much they want to."""

    elements: torch.Tensor  # (C,) int32, in the owner's part
    values: torch.Tensor  # (C,) int8: accumulators in units of 1/64 of the threshold
    ranks: torch.Tensor  # (C,) int16: 64 .. 127; in int8 a comparison with 128 would wrap
    flipped: torch.Tensor  # (C,) uint8: bit k set where the bit of plane k would flip
    steps: torch.Tensor  # (C,) fp32: change of the weight over 2 |s|, s the scale of the plane that gives the unit

    def only(self, chosen: torch.Tensor) -> Candidates:
        """Those of a mask or of indices."""
        return Candidates(*(tensor[chosen] for tensor in vars(self).values()))

    def __add__(self, other: Candidates) -> Candidates:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Candidates(*(torch.cat(pair) for pair in pairs))


def bit_moves(elements: torch.Tensor, values: torch.Tensor, plane: int) -> Candidates:
    """Each element's bit of one plane; the accumulator's size is the rank."""
    flipped = torch.full_like(elements, 1 << plane, dtype=torch.uint8)
    return Candidates(elements, values, values.abs().short(), flipped, -values.sign().float())


def level_moves(
    elements: torch.Tensor,  # (C,) int32, in the owner's part
    values: torch.Tensor,  # (C,) int8: accumulated dL/dW / (|s_last| h), units of 1/64
    words: list[torch.Tensor],  # K tensors (P,) int32: the owner's part of every plane
    scale_out: torch.Tensor,  # (K, m) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
    first_element: int,  # global index of the owner's first element
    row_elements: int,  # elements of a row, padding included
) -> Candidates:
    """Each element's move to the next level downhill. A step of D changes the loss by -|G| D + h D^2 / 2, so it pays
    where |G| / h > D / 2; the accumulator is in units of |s_last|, half the step that the last plane makes, and the
    rank takes the step as it is. Elements on their outermost level, or for which the step is too long, drop out."""
    num_planes = len(words)
    bits = torch.stack([bits_at(plane, elements) for plane in words])  # (K, C)
    positions = elements.long() + first_element
    scales = scale_out[:, positions // row_elements] * scale_in[:, positions % row_elements]  # (K, C)
    current = _level(list((1 - 2 * bits).float()), scales)
    downhill = -values.sign().float()
    step = torch.full_like(current, torch.inf)
    target = torch.zeros_like(elements)
    too_short = 1e-6 * _level([1.0] * num_planes, scales.abs())  # rounding: the level that the element is on
    for code, signs in enumerate(itertools.product((1.0, -1.0), repeat=num_planes)):
        distance = (_level(signs, scales) - current) * downhill
        nearer = (distance > too_short) & (distance < step)
        step = torch.where(nearer, distance, step)
        target = torch.where(nearer, code, target)
    ranks = (values.float().abs() * 2 * scales[-1].abs() / step).clamp(max=TOP_RANK)
    flipped = torch.zeros_like(elements, dtype=torch.uint8)
    for k in range(num_planes):
        wanted = (target >> (num_planes - 1 - k)) & 1  # product() counts with the first plane as the highest bit
        flipped |= ((wanted ^ bits[k]) << k).to(torch.uint8)
    steps = downhill * step / (2 * scales[-1].abs())
    return Candidates(elements, values, ranks.short(), flipped, steps).only(ranks >= THRESHOLD)


def _level(signs: Sequence[float | torch.Tensor], scales: torch.Tensor) -> torch.Tensor:
    """sum_k signs[k] * scales[k], term by term: the same bits whatever the number of elements."""
    level = signs[0] * scales[0]
    for sign, scale in zip(signs[1:], scales[1:], strict=True):
        level = level + sign * scale
    return level

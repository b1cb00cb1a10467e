"""The baselines of the quality table: uniform integers in groups, rounded to nearest or by GPTQ (arXiv 2210.17323).

Asymmetric min-max grids: a group of ``group`` weights of a row shares a scale (counted as fp32, as ours are) and a
zero point of ``bits`` bits. Plain implementations, for comparison only.
"""

from __future__ import annotations

import torch

_DAMPING = 0.01  # of the mean of H's diagonal, GPTQ's default


def bits_per_weight(bits: int, group: int) -> float:
    """Average bits with scales and zero points."""
    return bits + (32 + bits) / group


def _grid(
    weights: torch.Tensor,  # (m, group)
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale (m, 1), zero point (m, 1)) of the min-max grid that contains 0."""
    low, high = weights.amin(1, keepdim=True).clamp_max(0), weights.amax(1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return scale, (-low / scale).round()


def _round(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return scale * ((weights / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def round_to_nearest(
    weight: torch.Tensor,  # (m, n)
    bits: int,
    group: int,
) -> torch.Tensor:
    """The rounded weight (m, n)."""
    parts = [_round(part, *_grid(part, bits), bits) for part in weight.split(group, dim=1)]
    return torch.cat(parts, dim=1)


def gptq(
    weight: torch.Tensor,  # (m, n)
    gram: torch.Tensor,  # (n, n): X^T X over the calibration tokens
    bits: int,
    group: int,
) -> torch.Tensor:
    """The rounded weight (m, n): columns in order, each one's error fed forward; a group's grid is set when its first
    column comes up, from the weights as corrected by then."""
    n = weight.shape[1]
    damped = gram.double() + _DAMPING * gram.diagonal().mean().double() * torch.eye(n, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    left = weight.clone()
    result = torch.empty_like(weight)
    for first in range(0, n, group):
        last = min(first + group, n)
        scale, zero = _grid(left[:, first:last], bits)
        errors = torch.empty(len(weight), last - first)
        for j in range(first, last):
            result[:, j] = _round(left[:, j : j + 1], scale, zero, bits)[:, 0]
            errors[:, j - first] = (left[:, j] - result[:, j]) / upper[j, j]
            left[:, j + 1 : last].addr_(errors[:, j - first], upper[j, j + 1 : last], alpha=-1)
        left[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return result

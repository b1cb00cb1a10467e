"""The nearest level of K planes for every weight.

With K planes a weight stands on one of 2^K levels, sum_k +-s_out_k,i s_in_k,j. A level is written as a code: bit k is
set where the sign of plane k is -1, as in a packed plane. Worked example: K = 2, s_out s_in = 3 and 1 make the levels
4 (code 0), -2 (code 1), 2 (code 2), -4 (code 3); the nearest to 1.5 is code 2: plane 0 is +1, plane 1 is -1.
"""

from __future__ import annotations

import torch

from mbdist_kernels import native


def nearest_levels(
    weight: torch.Tensor,  # (rows, n) fp32
    scale_out: torch.Tensor,  # (K, rows) fp32
    scale_in: torch.Tensor,  # (K, n) fp32
) -> torch.Tensor:
    """Codes (rows, n) uint8; of equally near levels the lower code. K <= 8."""
    if native.serves(weight) and native.takes_levels(weight, scale_out, scale_in):
        return native.nearest_levels(weight, scale_out, scale_in)
    magnitudes = scale_out[:, :, None] * scale_in[:, None, :]
    best = torch.full_like(weight, torch.inf)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for code in range(1 << len(magnitudes)):
        distance = (weight - level_of(magnitudes, code)).abs_()
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        codes.masked_fill_(nearer, code)
    return codes


def level_of(
    magnitudes: torch.Tensor,  # (K, ...)
    code: int,
) -> torch.Tensor:
    """sum_k +-magnitudes[k], term by term: (...)."""
    level = -magnitudes[0] if code & 1 else magnitudes[0]
    for k in range(1, len(magnitudes)):
        level = level - magnitudes[k] if (code >> k) & 1 else level + magnitudes[k]
    return level


def signs_of_codes(
    codes: torch.Tensor,  # any shape, uint8
    plane: int,
) -> torch.Tensor:
    """The signs +1 / -1 of one plane, int8, same shape."""
    return 1 - 2 * ((codes >> plane) & 1).to(torch.int8)

"""Levels of K planes chosen column by column, each column's error fed forward into the columns still to come.

Column j takes the nearest level (and its code: see ``nearest_levels``) of what is left of it; its error, weighted by a
triangular factor U of the inverse second moments of the inputs, is taken off the later columns (GPTQ, arXiv 2210.17323,
with this format's levels for its grid):

    e_ij = (w_ij - level_ij) / U_jj          w_ij' -= U_jj' e_ij          for j' > j
"""

from __future__ import annotations

import torch

from mbdist_kernels import native
from mbdist_kernels.nearest_levels import level_of


def feed_errors_forward(
    columns: torch.Tensor,  # (rows, b) fp32, contiguous: what is left of these columns; overwritten
    scale_out: torch.Tensor,  # (K, rows) fp32
    scale_in: torch.Tensor,  # (K, b) fp32
    upper: torch.Tensor,  # (b, b) fp32, contiguous: diagonal block of U
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (rows, b) uint8, errors e (rows, b) fp32). Of equally near levels the lower code wins. K <= 8.

    Worked example: K = 1, s_out = [1], s_in = [1, 1], U = [[1, 0.5], [0, 1]] and columns [[0.4, 0.1]] give code 0 (+1)
    and e = -0.6 first; 0.1 + 0.5 * 0.6 = 0.4 is left of the second column: code 0, e = -0.6.
    """
    if native.serves(columns, upper) and native.takes_levels(columns, scale_out, scale_in):
        return native.feed_errors_forward(columns, scale_out, scale_in, upper)
    rows, width = columns.shape
    codes = torch.empty(rows, width, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns)
    for j in range(width):
        magnitudes = scale_out * scale_in[:, j : j + 1]  # (K, rows)
        levels = torch.stack([level_of(magnitudes, code) for code in range(1 << len(magnitudes))])
        nearest = (columns[:, j] - levels).abs_().argmin(0)
        codes[:, j] = nearest
        errors[:, j] = (columns[:, j] - levels.gather(0, nearest[None])[0]) / upper[j, j]
        columns[:, j + 1 :] -= upper[j, j + 1 :] * errors[:, j : j + 1]
    return codes, errors

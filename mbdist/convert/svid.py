"""Successive extraction of planes, from the weights alone (arXiv 2505.22811, section 3; SVID: arXiv 2402.11295).

Plane k is the sign-value decomposition of what planes 0 .. k-1 leave: B = sign(R), and the best rank-1 approximation
of |R| for the scales. |R| is not negative, so its leading singular vectors are not either (Perron-Frobenius).
"""

from __future__ import annotations

import torch

from mbdist.convert.planes import PlaneSet
from mbdist_kernels import pack_signs

_POWER_ITERATIONS = 12


def rank_one_magnitude(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(u (m,), v (n,)), u v^T the best rank-1 approximation of a nonnegative matrix; its norm is shared evenly."""
    v = magnitude.mean(0)
    u = magnitude @ v
    for _ in range(_POWER_ITERATIONS):
        u = magnitude @ v
        u = u / u.norm().clamp_min(torch.finfo(u.dtype).tiny)
        v = magnitude.T @ u
    norm = v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    return u * norm.sqrt(), v / norm.sqrt()


def svid(
    weight: torch.Tensor,  # (m, n) float
    num_planes: int,
) -> PlaneSet:
    """``num_planes`` planes by successive extraction."""
    residual = weight.float().clone()
    planes, scales_out, scales_in = [], [], []
    for _ in range(num_planes):
        u, v = rank_one_magnitude(residual.abs())
        signs = torch.where(residual < 0, -1.0, 1.0)
        planes.append(pack_signs(residual))
        scales_out.append(u)
        scales_in.append(v)
        residual -= signs * torch.outer(u, v)
    return PlaneSet(planes, torch.stack(scales_out), torch.stack(scales_in))

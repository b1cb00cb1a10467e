"""Successive extraction of planes, from the weights alone (arXiv 2505.22811, section 3; SVID: arXiv 2402.11295).

Plane k is the sign-value decomposition of what planes 0 .. k-1 leave: B = sign(R), and the best rank-1 approximation
of |R| for the scales. |R| is not negative, so its leading singular vectors are not either (Perron-Frobenius).
"""

from __future__ import annotations

from collections.abc import Iterator

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
    planes, scales_out, scales_in = [], [], []
    for signs_of, u, v in _extract(weight, num_planes):
        planes.append(pack_signs(signs_of))
        scales_out.append(u)
        scales_in.append(v)
    return PlaneSet(planes, torch.stack(scales_out), torch.stack(scales_in))


def successive_residuals(
    weight: torch.Tensor,  # (m, n) float
    num_planes: int,
) -> list[float]:
    """Norm of what 1, 2, .., num_planes planes leave: ||R - B * u v^T||^2 = ||R||^2 - ||u v^T||^2 at the best u v^T."""
    residuals = []
    for before, u, v in _extract(weight, num_planes):
        left = before.square().sum() - (u.square().sum() * v.square().sum())
        residuals.append(left.clamp_min(0).sqrt().item())
    return residuals


def _extract(weight: torch.Tensor, num_planes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(residual before the plane, whose signs are the plane; u; v), plane by plane."""
    residual = weight.float().clone()
    for _ in range(num_planes):
        u, v = rank_one_magnitude(residual.abs())
        yield residual, u, v
        residual -= torch.where(residual < 0, -1.0, 1.0) * torch.outer(u, v)

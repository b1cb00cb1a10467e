"""Successive extraction of planes, from the weights alone (arXiv 2505.22811, section 3; SVID: arXiv 2402.11295).

Plane k is the sign-value decomposition of what planes 0 .. k-1 leave: B = sign(R), and the best rank-1 approximation
of |R| for the scales. |R| is not negative, so its leading singular vectors are not either (Perron-Frobenius).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mbdist.convert.planes import PlaneSet
from mbdist.convert.weighted_matrix import WeightedMatrix, row_chunks
from mbdist_kernels import dequantize, pack_signs, words_per_row

_POWER_ITERATIONS = 12


def svid(
    weight: torch.Tensor | WeightedMatrix,  # (m, n)
    num_planes: int,
) -> PlaneSet:
    """``num_planes`` planes by successive extraction."""
    found, _ = _extract(WeightedMatrix.of(weight), num_planes)
    return found


def successive_residuals(
    weight: torch.Tensor | WeightedMatrix,  # (m, n)
    num_planes: int,
) -> list[float]:
    """Norm of what 1, 2, .., num_planes planes leave: ||R - B * u v^T||^2 = ||R||^2 - ||u v^T||^2 at the best u v^T."""
    found, energies = _extract(WeightedMatrix.of(weight), num_planes)
    taken = found.scale_out.double().square().sum(1) * found.scale_in.double().square().sum(1)
    return [max(0.0, before - explained) ** 0.5 for before, explained in zip(energies, taken.tolist(), strict=True)]


def _extract(matrix: WeightedMatrix, num_planes: int) -> tuple[PlaneSet, list[float]]:
    """The planes, and ||R||^2 before each."""
    m, n = matrix.shape
    found = PlaneSet(
        [torch.zeros(m, words_per_row(n), dtype=torch.int32) for _ in range(num_planes)],
        torch.zeros(num_planes, m),
        torch.zeros(num_planes, n),
    )
    energies = []
    for k in range(num_planes):
        residual = _Residual(matrix, found, k)
        _rank_one_magnitude(residual, found.scale_out[k], found.scale_in[k])
        energy = 0.0
        for rows, left in residual.chunks():
            found.planes[k][rows] = pack_signs(left)
            energy += left.square().sum(dtype=torch.float64).item()
        energies.append(energy)
    return found, energies


class _Residual:
    """What the first planes leave of a matrix. Small enough, it is kept; else it is made anew for every pass."""

    def __init__(self, matrix: WeightedMatrix, found: PlaneSet, planes: int):
        self.matrix, self.found, self.planes = matrix, found, planes
        self.kept = list(self._made()) if len(row_chunks(matrix.shape)) == 1 else None

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        return iter(self.kept) if self.kept is not None else self._made()

    def _made(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, part in self.matrix.chunks():
            if self.planes:
                planes = [plane[rows] for plane in self.found.planes[: self.planes]]
                scale_out = self.found.scale_out[: self.planes, rows].contiguous()
                part = part - dequantize(planes, scale_out, self.found.scale_in[: self.planes])
            yield rows, part


def _rank_one_magnitude(residual: _Residual, u: torch.Tensor, v: torch.Tensor) -> None:
    """Write u (m,) and v (n,), u v^T the best rank-1 approximation of |R|; its norm is shared evenly."""
    v.zero_()
    for _, left in residual.chunks():
        v += left.abs().sum(0)
    v /= len(u)
    tiny = torch.finfo(v.dtype).tiny
    for _ in range(_POWER_ITERATIONS):
        onward = torch.zeros_like(v)
        for rows, left in residual.chunks():
            magnitude = left.abs()
            u[rows] = magnitude @ v
            onward += magnitude.T @ u[rows]
        norm = u.norm().clamp_min(tiny)
        u /= norm
        torch.div(onward, norm, out=v)
    norm = v.norm().clamp_min(tiny)
    u *= norm.sqrt()
    v /= norm.sqrt()

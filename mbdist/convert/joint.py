"""Planes found together: nearest level for every element, exact least squares for the scales, in turns.

With K planes an element can take 2^K levels, sum_k +-s_out_k,i s_in_k,j. A sweep (a) sets all K signs of every element
to the nearest level; (b) solves for s_out with signs and s_in fixed: a K x K least-squares problem a row; (c) the same
for s_in by columns. No part of a sweep can raise the error. Starts from successive extraction, needs no data.

Measured on Gaussian weights, relative error^2 of successive against joint extraction: .131/.118 (K = 2), .0585/.0372
(K = 3), .0331/.0116 (K = 4): three joint planes are nearly as good as four successive ones.
"""

from __future__ import annotations

import itertools

import torch

from mbdist.convert.planes import PlaneSet
from mbdist.convert.svid import svid
from mbdist.convert.weighted_matrix import WeightedMatrix
from mbdist_kernels import nearest_levels, pack_signs, signs_of_codes

_SWEEPS = 10
_RIDGE = 1e-6  # of the mean diagonal: planes with equal signs in a row would make the problem singular


def joint(
    weight: torch.Tensor | WeightedMatrix,  # (m, n)
    num_planes: int,
) -> PlaneSet:
    """``num_planes`` planes found together; the planes are ordered by scale, the largest first."""
    found = svid(weight, num_planes)
    for _ in range(_SWEEPS):
        sweep(weight, found)
    return ordered_by_scale(found)


def sweep(
    weight: torch.Tensor | WeightedMatrix,  # (m, n)
    found: PlaneSet,
) -> None:
    """One round of signs, s_out, s_in, in place. The error ||W - W_hat||^2 does not rise."""
    num_planes, n = found.scale_in.shape
    normal = torch.zeros(n, num_planes, num_planes)  # of the column problems, summed over chunks of rows
    right = torch.zeros(n, num_planes)
    for rows, part in WeightedMatrix.of(weight).chunks():
        codes = nearest_levels(part, found.scale_out[:, rows], found.scale_in)  # (rows, n)
        signs = [signs_of_codes(codes, k).float() for k in range(num_planes)]
        for plane, sign in zip(found.planes, signs, strict=True):
            plane[rows] = pack_signs(sign)
        signed = [sign * part for sign in signs]  # B_k * W
        agreement = {pair: signs[pair[0]] * signs[pair[1]] for pair in itertools.combinations(range(num_planes), 2)}
        of_rows = _problems(found.scale_in, signed, agreement)
        scale_out = least_squares(*of_rows, found.scale_out[:, rows].T).T.contiguous()
        found.scale_out[:, rows] = scale_out
        transposed = {pair: matrix.T for pair, matrix in agreement.items()}
        of_columns = _problems(scale_out, [matrix.T for matrix in signed], transposed)
        normal += of_columns[0]
        right += of_columns[1]
    found.scale_in.copy_(least_squares(normal, right, found.scale_in.T).T)


def _problems(
    scales: torch.Tensor,  # (K, n) of the other side, which stay
    signed: list[torch.Tensor],  # K matrices (m, n): B_k * W
    agreement: dict[tuple[int, int], torch.Tensor],  # (m, n) by pair of planes k < l: B_k * B_l
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of every row's scales: normal equations (m, K, K) sum_j B_k B_l s_k s_l, and right sides (m, K)
    sum_j B_k s_k W."""
    num_planes, m = len(signed), len(signed[0])
    normal = torch.empty(m, num_planes, num_planes)
    for k in range(num_planes):
        normal[:, k, k] = scales[k].square().sum()
    for (k, other), agrees in agreement.items():
        normal[:, k, other] = normal[:, other, k] = agrees @ (scales[k] * scales[other])
    return normal, torch.stack([matrix @ scale for matrix, scale in zip(signed, scales, strict=True)], dim=1)


def least_squares(
    normal: torch.Tensor,  # (batch, K, K)
    right: torch.Tensor,  # (batch, K)
    before: torch.Tensor,  # (batch, K): kept where the problem says nothing
) -> torch.Tensor:
    """Least squares of every batch entry. A small pull towards ``before`` keeps it solvable and the error falling."""
    ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye = torch.eye(normal.shape[1], device=normal.device)
    return torch.linalg.solve(normal + ridge[:, None, None] * eye, right + ridge[:, None] * before)


def ordered_by_scale(found: PlaneSet) -> PlaneSet:
    """The same sum with the planes of largest scale first, so that "the last plane" is the smallest."""
    size = found.scale_out.abs().mean(1) * found.scale_in.abs().mean(1)
    order = size.argsort(descending=True).tolist()
    return PlaneSet([found.planes[k] for k in order], found.scale_out[order], found.scale_in[order])

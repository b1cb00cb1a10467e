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
from mbdist_kernels import pack_signs

_SWEEPS = 10
_CHUNK_ELEMENTS = 1 << 20  # rows worked on at a time: K sign matrices of this size are unpacked at once
_RIDGE = 1e-6  # of the mean diagonal: planes with equal signs in a row would make the problem singular


def joint(
    weight: torch.Tensor,  # (m, n) float
    num_planes: int,
) -> PlaneSet:
    """``num_planes`` planes found together; the planes are ordered by scale, the largest first."""
    weight = weight.float()
    found = svid(weight, num_planes)
    for _ in range(_SWEEPS):
        sweep(weight, found)
    return ordered_by_scale(found)


def sweep(weight: torch.Tensor, found: PlaneSet) -> None:
    """One round of signs, s_out, s_in, in place. The error ||W - W_hat||^2 does not rise."""
    num_planes, n = found.scale_in.shape
    normal = torch.zeros(n, num_planes, num_planes)  # of the column problems, summed over chunks of rows
    right = torch.zeros(n, num_planes)
    for rows in row_chunks(weight, _CHUNK_ELEMENTS):
        part = weight[rows]
        signs = nearest_signs(part, found.scale_out[:, rows], found.scale_in)  # (K, rows, n)
        for plane, sign in zip(found.planes, signs, strict=True):
            plane[rows] = pack_signs(sign)
        basis = signs * found.scale_in[:, None, :]
        scale_out = least_squares(
            torch.einsum("kij,lij->ikl", basis, basis),
            torch.einsum("kij,ij->ik", basis, part),
            found.scale_out[:, rows].T,
        )
        found.scale_out[:, rows] = scale_out.T
        basis = signs * scale_out.T[:, :, None]
        normal += torch.einsum("kij,lij->jkl", basis, basis)
        right += torch.einsum("kij,ij->jk", basis, part)
    found.scale_in.copy_(least_squares(normal, right, found.scale_in.T).T)


def row_chunks(weight: torch.Tensor, elements: int) -> list[slice]:
    """Slices of rows of at most so many elements."""
    m, n = weight.shape
    step = max(1, elements // n)
    return [slice(first, min(first + step, m)) for first in range(0, m, step)]


def nearest_signs(
    weight: torch.Tensor,  # (rows, n)
    scale_out: torch.Tensor,  # (K, rows)
    scale_in: torch.Tensor,  # (K, n)
) -> torch.Tensor:
    """Signs (K, rows, n) of the level nearest to every element; of equally near ones the first."""
    magnitudes = scale_out[:, :, None] * scale_in[:, None, :]
    best = torch.full_like(weight, torch.inf)
    signs = torch.ones_like(magnitudes)
    for pattern in itertools.product((1.0, -1.0), repeat=len(magnitudes)):
        level = sum(sign * magnitude for sign, magnitude in zip(pattern, magnitudes, strict=True))
        distance = (weight - level).abs_()
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        for k, sign in enumerate(pattern):
            signs[k].masked_fill_(nearer, sign)
    return signs


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

"""Planes that keep a layer's outputs, not its weights: weighted joint extraction, then error feedback on the signs.

1. The joint extraction of diag(d_out) W diag(d_in), with d_in the rms of each input and d_out that of each output's
   gradient over the calibration tokens. d_out and d_in are divided back into s_out and s_in, so the format stays.
2. Column by column, in order of falling input power, every weight takes the nearest of its 2^K levels, and the error is
   fed forward into the columns still to come, weighted by H^-1 (GPTQ, arXiv 2210.17323, with this format's levels for
   its grid). H = X^T X plus 1 % of its mean diagonal.
3. Least squares of s_out under H.

On SmolLM2-135M this start is worth four orders of magnitude of perplexity over the best data-free one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from mbdist.convert.calibration import LayerMoments
from mbdist.convert.joint import joint, least_squares, ordered_by_scale, row_chunks
from mbdist.convert.planes import PlaneSet
from mbdist_kernels import pack_signs

_DAMPING = 0.01  # of the mean of H's diagonal
_BLOCK = 128  # columns whose errors are fed forward together
_CHUNK_ELEMENTS = 1 << 22  # of the rows worked on at a time: their K sign matrices are unpacked at once
_WEIGHT_FLOOR = 1e-3  # of the mean: an input that is never active must not get a weight of 0


def calibrated(
    weight: torch.Tensor,  # (m, n) float
    num_planes: int,
    moments: LayerMoments,
) -> PlaneSet:
    """``num_planes`` planes that keep the outputs on the calibration tokens; the planes of largest scale first."""
    weight = weight.float()
    d_in, d_out = _relative_rms(moments.input_squares), _relative_rms(moments.output_squares)
    found = joint(weight * d_in * d_out[:, None], num_planes)
    found.scale_in /= d_in
    found.scale_out /= d_out
    damping = _DAMPING * moments.gram.diagonal().mean().clamp_min(1e-30)
    hessian = moments.gram + damping * torch.eye(len(d_in))
    factor = FeedbackFactor.of(hessian)
    scale_out = torch.empty_like(found.scale_out)
    for rows in row_chunks(weight, _CHUNK_ELEMENTS):
        levels = PlaneSet([], found.scale_out[:, rows], found.scale_in)
        signs = feed_errors_forward(weight[rows], levels, factor)
        scale_out[:, rows] = _scales_under(hessian, weight[rows], signs, levels)
        for plane, sign in zip(found.planes, signs, strict=True):
            plane[rows] = pack_signs(sign)
    return ordered_by_scale(PlaneSet(found.planes, scale_out, found.scale_in))


def _relative_rms(squares: torch.Tensor) -> torch.Tensor:
    rms = squares.sqrt()
    return (rms / rms.mean().clamp_min(1e-30)).clamp_min(_WEIGHT_FLOOR)


@dataclass(frozen=True)
class FeedbackFactor:
    """Where the error of a column goes. Costs n^3; all rows share it."""

    order: torch.Tensor  # (n,) columns by falling input power
    upper: torch.Tensor  # (n, n) fp32: upper Cholesky factor of H^-1 in that order

    @classmethod
    def of(cls, hessian: torch.Tensor) -> FeedbackFactor:
        """``hessian`` (n, n), positive definite."""
        order = hessian.diagonal().argsort(descending=True)
        # fp64: the inverse of a nearly singular H loses most of fp32's digits
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order].double()))
        return cls(order, torch.linalg.cholesky(inverse, upper=True).float())


def feed_errors_forward(
    weight: torch.Tensor,  # (rows, n)
    found: PlaneSet,  # levels of these rows; its signs are not used
    factor: FeedbackFactor,
) -> torch.Tensor:
    """Signs (K, rows, n) chosen column by column with error feedback."""
    num_planes, n = found.scale_in.shape
    order, upper = factor.order, factor.upper
    patterns = torch.tensor(list(itertools.product((1.0, -1.0), repeat=num_planes)))  # (2^K, K)
    scale_in = found.scale_in[:, order]
    columns = weight[:, order].T.contiguous()  # (n, rows): a column is contiguous
    signs = torch.empty(n, num_planes, weight.shape[0])
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        errors = torch.empty(last - first, weight.shape[0])
        for j in range(first, last):
            levels = patterns @ (found.scale_out * scale_in[:, j : j + 1])  # (2^K, rows)
            nearest = (columns[j] - levels).abs_().argmin(0)
            signs[j] = patterns[nearest].T
            errors[j - first] = (columns[j] - levels.gather(0, nearest[None])[0]) / upper[j, j]
            columns[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j - first], alpha=-1)
        columns[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    back = order.argsort()
    return signs[back].permute(1, 2, 0).contiguous()


def _scales_under(hessian: torch.Tensor, weight: torch.Tensor, signs: torch.Tensor, found: PlaneSet) -> torch.Tensor:
    """s_out (K, m) of least output error: per row a K x K problem in the metric of H."""
    basis = signs * found.scale_in[:, None, :]  # (K, m, n)
    through = basis @ hessian
    normal = torch.einsum("kij,lij->ikl", through, basis)
    right = torch.einsum("kij,ij->ik", through, weight)
    return least_squares(normal, right, found.scale_out.T).T.contiguous()

"""How many planes each matrix gets under a budget of average bits (arXiv 2505.22811, section 5).

Both rules start from one plane a matrix and keep giving a plane to the matrix where that lowers the objective most:

* ``second_order`` (ours): sum over matrices of the square of tr(D_out E X^T X E^T), the factored second-order estimate
  of what the error E of the calibrated planes does to the loss; D_out are the second moments of the output gradients.
  Squared, because large errors cost more than their second order says. Gains count per bit, because a plane of a large
  matrix spends more of the budget. (With the second moments of the inputs alone for X^T X, and so without error
  feedback, it is worse at two planes' bits than two planes everywhere.)
* ``residual`` (the paper's, with equal importances): sum of e_l f(p_l), e_l the norm of the residual that successive
  planes leave, p_l the matrix's share of the weights, f(p) = log(1 / p) / p. Needs no data. f favours small matrices
  strongly, which is why ``max_planes`` is needed.
"""

from __future__ import annotations

import heapq
import math

import torch

from mbdist.convert.calibrated import OutputMetric, choose_signs, levels_in_metric
from mbdist.convert.moments import LayerMoments
from mbdist.convert.svid import successive_residuals
from mbdist.errors import UserError
from mbdist_kernels import dequantize

_SAMPLED_ROWS = 256  # rows that an error is estimated on
SCALE_BITS = 32  # fp32


def plane_bits(shape: tuple[int, int]) -> int:
    """Bits that one plane of a matrix (m, n) costs, its scales included."""
    m, n = shape
    return m * n + SCALE_BITS * (m + n)


def sampled(weight: torch.Tensor, moments: LayerMoments) -> tuple[torch.Tensor, LayerMoments]:
    """Some rows (r, n) that stand for all of a matrix (m, n), and their moments. Evenly spread, but not by a whole
    number: a stride that divides the size of a head would see the same few of its rows in all heads."""
    m = weight.shape[0]
    rows = torch.linspace(0, m - 1, min(m, _SAMPLED_ROWS), dtype=torch.float64).round().long()
    return weight[rows].float(), LayerMoments(moments.input_squares, moments.output_squares[rows] * (m / len(rows)))


def second_order_errors(
    weight: torch.Tensor,  # (r, n) fp32, as ``sampled``
    moments: LayerMoments,
    metric: OutputMetric,
    max_planes: int,
) -> list[float]:
    """The square of the estimated change of the loss with 1 .. max_planes calibrated planes, up to a factor that all
    matrices share."""
    errors = []
    for num_planes in range(1, max_planes + 1):
        found = levels_in_metric(weight, num_planes, moments.input_squares, moments.output_squares)
        planes, scale_out = choose_signs(weight, found.scale_out, found.scale_in, metric)
        error = weight - dequantize(planes, scale_out, found.scale_in)
        errors.append(((error @ metric.hessian * error).sum(1) @ moments.output_squares).item() ** 2)
    return errors


def residual_errors(
    weight: torch.Tensor,  # (m, n)
    share: float,  # p: the matrix's share of all weights
    max_planes: int,
) -> list[float]:
    """e(K) f(p) with 1 .. max_planes successive planes."""
    return [norm * math.log(1 / share) / share for norm in successive_residuals(weight, max_planes)]


def spare_bits(shapes: dict[str, tuple[int, int]], average_bits: float, max_planes: int) -> float:
    """What a budget leaves after one plane each. Raises UserError where that is less than nothing, or more than
    ``max_planes`` each would use up."""
    weights = sum(m * n for m, n in shapes.values())
    least = sum(plane_bits(shape) for shape in shapes.values())
    bits, average = average_bits * weights, least / weights
    if bits < least:
        least_bits = f"one plane each, with scales, takes {average:.3f}"
        raise UserError(f"{average_bits} bits a weight are too few: {least_bits}; raise bits to that")
    if bits > max_planes * least:
        most = f"max_planes={max_planes}, with scales, takes {max_planes * average:.3f}"
        raise UserError(f"{average_bits} bits a weight are too many: {most}; raise max_planes or lower bits")
    return bits - least


def allocate(
    errors: dict[str, list[float]],  # by matrix: the objective's term with 1, 2, .. planes
    shapes: dict[str, tuple[int, int]],
    average_bits: float,  # a weight, scales included
    per_bit: bool,  # rank by gain a bit, not by gain
) -> dict[str, int]:
    """Planes by matrix. Raises UserError as ``spare_bits`` does."""
    left = spare_bits(shapes, average_bits, max(map(len, errors.values())))
    chosen = dict.fromkeys(shapes, 1)

    def gain(name: str) -> float:
        at = chosen[name]
        lowered = errors[name][at - 1] - errors[name][at]
        return lowered / plane_bits(shapes[name]) if per_bit else lowered

    heap = [(-gain(name), name) for name in shapes if len(errors[name]) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        cost = plane_bits(shapes[name])
        if cost > left:
            continue  # a smaller matrix may still fit
        left -= cost
        chosen[name] += 1
        if chosen[name] < len(errors[name]):
            heapq.heappush(heap, (-gain(name), name))
    return chosen

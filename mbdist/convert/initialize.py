"""The initialisations: float matrices in, planes and scales out, cut into jobs that any number of processes may share.

A job is one matrix, or a fixed number of rows of one; it computes with nothing but its arguments. So the planes do not
depend on how the jobs are spread: one after the other here (``in_turn``), or over the workers of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mbdist.convert.calibrated import OutputMetric, choose_signs, levels_in_metric
from mbdist.convert.calibration import LayerMoments
from mbdist.convert.joint import joint, ordered_by_scale
from mbdist.convert.planes import PlaneSet
from mbdist.convert.svid import svid
from mbdist.convert.weighted_matrix import row_chunks


class Spread(Protocol):
    """How jobs are carried out."""

    def __call__(self, function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
        """``function(*job)`` for every job, in the order of the jobs."""


def in_turn(function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
    """One job after the other in this process."""
    for job in jobs:
        yield function(*job)


@dataclass(frozen=True)
class Matrix:
    """One weight to be converted."""

    weight: torch.Tensor  # (m, n) float
    num_planes: int
    moments: LayerMoments | None  # where the initialisation is calibrated


def _svid(matrices: Sequence[Matrix], spread: Spread) -> list[PlaneSet]:
    return list(spread(svid, [(matrix.weight, matrix.num_planes) for matrix in matrices]))


def _joint(matrices: Sequence[Matrix], spread: Spread) -> list[PlaneSet]:
    return list(spread(joint, [(matrix.weight, matrix.num_planes) for matrix in matrices]))


def _calibrated(matrices: Sequence[Matrix], spread: Spread) -> list[PlaneSet]:
    squares = [(matrix.moments.input_squares, matrix.moments.output_squares) for matrix in matrices]
    levels = list(
        spread(levels_in_metric, [(m.weight, m.num_planes, *of) for m, of in zip(matrices, squares, strict=True)])
    )
    grams = {
        id(matrix.moments.gram): matrix.moments.gram for matrix in matrices
    }  # layers with the same inputs share it
    metrics = dict(zip(grams, spread(OutputMetric.of, [(gram,) for gram in grams.values()]), strict=True))
    jobs, places = [], []
    for matrix, found in zip(matrices, levels, strict=True):
        for rows in row_chunks(tuple(matrix.weight.shape)):
            metric = metrics[id(matrix.moments.gram)]
            jobs.append((matrix.weight[rows], found.scale_out[:, rows].contiguous(), found.scale_in, metric))
            places.append((found, rows))
    for (found, rows), (planes, scale_out) in zip(places, spread(choose_signs, jobs), strict=True):
        for plane, part in zip(found.planes, planes, strict=True):
            plane[rows] = part
        found.scale_out[:, rows] = scale_out
    return [ordered_by_scale(found) for found in levels]


# (matrices of one block, spread) -> planes and scales of each
INITIALIZATIONS: dict[str, Callable[[Sequence[Matrix], Spread], list[PlaneSet]]] = {
    "svid": _svid,
    "joint": _joint,
    "calibrated": _calibrated,
}

"""The initialisations: float matrices in, planes and scales out, cut into jobs that any number of processes may share.

A job is one matrix, or a fixed number of rows of one; it computes with nothing but its arguments. So the planes do not
depend on how the jobs are spread: one after the other here (``in_turn``), or over the workers of a cluster.
"""

from __future__ import annotations

import itertools
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


in_turn: Spread = itertools.starmap  # one job after the other in this process


@dataclass(frozen=True)
class Matrix:
    """One weight to be converted."""

    weight: torch.Tensor  # (m, n) float
    num_planes: int
    moments: LayerMoments | None  # where the initialisation is calibrated


# (matrices of one block, spread) -> planes and scales of each
Initialization = Callable[[Sequence[Matrix], Spread], list[PlaneSet]]


def _from_weights(initialize: Callable[[torch.Tensor, int], PlaneSet]) -> Initialization:
    """One that needs no data: a job a matrix."""
    return lambda matrices, spread: list(spread(initialize, [(each.weight, each.num_planes) for each in matrices]))


def _calibrated(matrices: Sequence[Matrix], spread: Spread) -> list[PlaneSet]:
    whole = [
        (each.weight, each.num_planes, each.moments.input_squares, each.moments.output_squares) for each in matrices
    ]
    levels = list(spread(levels_in_metric, whole))
    # Layers with the same inputs share one X^T X, and so one metric.
    grams = {id(each.moments.gram): each.moments.gram for each in matrices}
    metrics = dict(zip(grams, spread(OutputMetric.of, [(gram,) for gram in grams.values()]), strict=True))
    jobs, places = [], []
    for matrix, found in zip(matrices, levels, strict=True):
        metric = metrics[id(matrix.moments.gram)]
        for rows in row_chunks(tuple(matrix.weight.shape)):
            jobs.append((matrix.weight[rows], found.scale_out[:, rows].contiguous(), found.scale_in, metric))
            places.append((found, rows))
    for (found, rows), (planes, scale_out) in zip(places, spread(choose_signs, jobs), strict=True):
        for plane, part in zip(found.planes, planes, strict=True):
            plane[rows] = part
        found.scale_out[:, rows] = scale_out
    return [ordered_by_scale(found) for found in levels]


INITIALIZATIONS: dict[str, Initialization] = {
    "svid": _from_weights(svid),
    "joint": _from_weights(joint),
    "calibrated": _calibrated,
}

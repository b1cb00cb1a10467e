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
from mbdist.convert.calibration import sharing_inputs
from mbdist.convert.joint import joint, ordered_by_scale
from mbdist.convert.moments import LayerMoments
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

    read: Callable[[], torch.Tensor]  # the weight (m, n) float
    num_planes: int
    moments: LayerMoments | None = None  # where the initialisation is calibrated; its gram is given up to it


# (matrices, spread) -> planes and scales of each, in order; calibrated ones are those of one block
Initialization = Callable[[Sequence[Matrix], Spread], Iterator[PlaneSet]]


def _from_weights(initialize: Callable[[torch.Tensor, int], PlaneSet]) -> Initialization:
    """One that needs no data: a job a matrix, begun when it is asked for or, on workers, when one is free."""
    return lambda matrices, spread: iter(spread(initialize, ((each.read(), each.num_planes) for each in matrices)))


def _calibrated(matrices: Sequence[Matrix], spread: Spread) -> Iterator[PlaneSet]:
    whole = (
        (each.read(), each.num_planes, each.moments.input_squares, each.moments.output_squares) for each in matrices
    )
    found = list(spread(levels_in_metric, whole))
    sharing = sharing_inputs({number: each.moments.gram for number, each in enumerate(matrices)})
    metrics = spread(OutputMetric.of, (_taken_gram(matrices, numbers) for numbers in sharing))
    for numbers in sharing:
        metric = next(metrics)  # not by zip, which would keep the one before meanwhile
        jobs = _by_rows([(matrices[number], found[number]) for number in numbers], metric)
        places = [(found[number], rows) for number in numbers for rows in row_chunks(_shape(found[number]))]
        for (planes, rows), (signs, scale_out) in zip(places, spread(choose_signs, jobs), strict=True):
            for plane, part in zip(planes.planes, signs, strict=True):
                plane[rows] = part
            planes.scale_out[:, rows] = scale_out
        del metric
    return map(ordered_by_scale, found)


def _taken_gram(matrices: Sequence[Matrix], numbers: list[int]) -> tuple[torch.Tensor]:
    gram = matrices[numbers[0]].moments.gram
    for number in numbers:
        matrices[number].moments.gram = None
    return (gram,)


def _by_rows(matrices: list[tuple[Matrix, PlaneSet]], metric: OutputMetric) -> Iterator[tuple]:
    """The jobs of ``choose_signs``; one weight is in memory at a time."""
    for matrix, levels in matrices:
        weight = matrix.read()
        scale_out, scale_in = levels.scale_out.clone(), levels.scale_in  # results are written to the former meanwhile
        for rows in row_chunks(tuple(weight.shape)):
            yield weight[rows], scale_out[:, rows].contiguous(), scale_in, metric


def _shape(planes: PlaneSet) -> tuple[int, int]:
    return planes.scale_out.shape[1], planes.scale_in.shape[1]


INITIALIZATIONS: dict[str, Initialization] = {
    "svid": _from_weights(svid),
    "joint": _from_weights(joint),
    "calibrated": _calibrated,
}

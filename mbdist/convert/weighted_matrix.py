"""A weight matrix with row and column weights, made a few rows at a time: no copy of a large matrix is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_CHUNK_ELEMENTS = 1 << 20  # rows worked on at a time; fixed, because the sums over chunks depend on where they are cut


@dataclass(frozen=True)
class WeightedMatrix:
    """diag(row_weights) W diag(column_weights), in fp32."""

    weight: torch.Tensor  # (m, n) float
    row_weights: torch.Tensor | None = None  # (m,) fp32
    column_weights: torch.Tensor | None = None  # (n,) fp32

    @classmethod
    def of(cls, weight: torch.Tensor | WeightedMatrix) -> WeightedMatrix:
        """A plain tensor as one that is weighted evenly."""
        return weight if isinstance(weight, WeightedMatrix) else cls(weight)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """These rows, (rows, n) fp32, a copy: sums of a BLAS depend on where in memory a matrix begins."""
        part = self.weight[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self.column_weights is not None:
            part *= self.column_weights
        if self.row_weights is not None:
            part *= self.row_weights[rows, None]
        return part

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, in chunks of bounded size: (slice, rows)."""
        for rows in row_chunks(self.shape):
            yield rows, self[rows]


def row_chunks(shape: tuple[int, int]) -> list[slice]:
    """Slices of rows of bounded size."""
    m, n = shape
    step = max(1, _CHUNK_ELEMENTS // n)
    return [slice(first, min(first + step, m)) for first in range(0, m, step)]

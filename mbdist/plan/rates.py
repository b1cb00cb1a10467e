"""Seconds that operations of a step take: as they were measured, or from a GPU's data sheet."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mbdist.errors import UserError

_REACHED = 0.6  # of the data sheet's rate, by the products of a training step: a guess


class Rates(Protocol):
    """What computing on one worker costs. ``matrix``: (m, n) of a weight."""

    source: str  # for whoever reads the plan

    def product(self, kind: str, matrix: tuple[int, int], planes: int, tokens: int) -> float:
        """Seconds of a product of the matrix with so many tokens: ``forward``, ``dX``, ``dW`` (to sign words and
        gradients of the scales) with packed planes, or ``dense`` with a bf16 weight."""

    def flips(self, matrix: tuple[int, int], accumulator: str) -> float:
        """Seconds to add one contribution to all accumulators of the matrix and to flip; of another kind of accumulator
        where this one was not measured."""

    def operations(self, count: float) -> float:
        """Seconds of so many floating-point operations in other products."""


@dataclass(frozen=True)
class DataSheet:
    """Every product at the same share of the peak. Flips, which wait for the memory, are left out."""

    name: str
    peak: float  # dense bf16 operations a second

    @property
    def source(self) -> str:
        return f"the data sheet of {self.name} ({_REACHED:.0%} of its peak), not measured"

    def product(self, kind: str, matrix: tuple[int, int], planes: int, tokens: int) -> float:
        return self.operations(2 * math.prod(matrix) * tokens)

    def flips(self, matrix: tuple[int, int], accumulator: str) -> float:
        return 0.0

    def operations(self, count: float) -> float:
        return count / (_REACHED * self.peak)


_ROWS_OF = {
    "forward": "linear, forward",
    "dense": "linear, forward",
    "dX": "linear, dX",
    "dW": "linear, dW to signs and scales",
}


class Measured:
    """Rows of ``mbdist bench kernels --json``: of each operation the one whose shape, planes and tokens are nearest,
    scaled by its weights and tokens."""

    def __init__(self, file: Path, sharing: int = 1):
        """``sharing``: workers that have the measured device together, as they have the cores of a machine."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self.device, self.copy_rate = content["device"], 1e9 * content["copy_gb_s"]
            self._rows = [row for row in content["rows"] if "+" not in row["shape"]]  # of one matrix
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--rates {file}: cannot be read: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--rates {file} is not what mbdist bench kernels --json writes: {error!r}") from None
        self._file, self._sharing = file, sharing

    @property
    def source(self) -> str:
        return f"{self._file.name}, measured on {self.device}"

    def product(self, kind: str, matrix: tuple[int, int], planes: int, tokens: int) -> float:
        row = self._nearest(_ROWS_OF[kind], matrix, planes, tokens)
        us = row["baseline_us"] if kind == "dense" else row["us"]
        return self._seconds(us) * math.prod(matrix) * tokens / (math.prod(_shape(row)) * row["batch"])

    def flips(self, matrix: tuple[int, int], accumulator: str) -> float:
        ops = {row["op"] for row in self._rows if row["op"].startswith("flip_update")}
        wanted = f"flip_update, {accumulator}"
        row = self._nearest(wanted if wanted in ops or not ops else min(ops), matrix, 1, 0)
        return self._seconds(row["us"]) * math.prod(matrix) / math.prod(_shape(row))

    def operations(self, count: float) -> float:
        """At the rate of the measured dense product of most tokens and weights."""
        rows = [row for row in self._rows if row["op"] == _ROWS_OF["dense"]]
        if not rows:
            raise self._lacks(_ROWS_OF["dense"])
        row = max(rows, key=lambda row: row["batch"] * math.prod(_shape(row)))
        return count * self._seconds(row["baseline_us"]) / (2 * math.prod(_shape(row)) * row["batch"])

    def _seconds(self, us: float) -> float:
        return 1e-6 * us * self._sharing

    def _nearest(self, op: str, matrix: tuple[int, int], planes: int, tokens: int) -> dict:
        wanted = (*matrix, planes, max(1, tokens))

        def distance(row: dict) -> float:
            sizes = (*_shape(row), row["planes"], max(1, row["batch"]))
            return sum(abs(math.log(there / here)) for there, here in zip(sizes, wanted, strict=True))

        rows = [row for row in self._rows if row["op"] == op]
        if not rows:
            raise self._lacks(op)
        return min(rows, key=distance)

    def _lacks(self, op: str) -> UserError:
        return UserError(f"--rates {self._file} has no row of '{op}': measure again with mbdist bench kernels --json")


def _shape(row: dict) -> list[int]:
    return [int(size) for size in row["shape"].split("x")]

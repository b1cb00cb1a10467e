"""What a rank sends in a step, counted on paper: for plans, and for more ranks than anybody has at hand.

Collectives cost what ring and pairwise algorithms send at least, as ``Communicator`` counts them. Tests hold the
numbers to those of real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mbdist.comm.codecs import CODECS, Segments
from mbdist.comm.partition import WordPartition
from mbdist.config.schema import CommConfig
from mbdist_kernels import words_per_row

_HISTOGRAM_BYTES = 8 * 64  # of the candidates of a matrix


@dataclass(frozen=True)
class TrainedModel:
    """What of a model crosses the wire."""

    shapes: Sequence[tuple[int, int]]  # (m, n) of every multi-Boolean matrix
    planes: int  # K
    trained_planes: int = 1  # that have accumulators, and signals, of their own
    other_floats: int = 0  # trained ones besides the scales
    frozen_gathered: int = 0  # bytes of frozen floats that stage 3 gathers for a micro-batch

    @property
    def weights(self) -> int:
        return sum(m * n for m, n in self.shapes)

    @property
    def plane_bytes(self) -> int:
        """Of one plane of every matrix."""
        return sum(4 * m * words_per_row(n) for m, n in self.shapes)

    @property
    def floats(self) -> int:
        """Trained floats: scales and others."""
        return self.planes * sum(m + n for m, n in self.shapes) + self.other_floats


def llama_shapes(layers: int, hidden: int, intermediate: int, key_values: int) -> list[tuple[int, int]]:
    """Matrices of a LLaMA; ``key_values``: columns of keys, and of values."""
    attention = [(hidden, hidden), (key_values, hidden), (key_values, hidden), (hidden, hidden)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)] * layers


def step_bytes(
    model: TrainedModel,
    ranks: int,
    stage: int,
    comm: CommConfig,  # node_size as a number or None
    micro_batches: int = 1,  # a rank
    flip_rate: float = 0.0,  # flips a trained weight in this step
) -> dict[str, int]:
    """{phase: bytes that a rank sends}; phases as in metrics.jsonl, DeepSpeed's by what they carry."""
    others = (ranks - 1) / ranks
    codec = CODECS[comm.codec]
    segments = [Segments(m, n, WordPartition(m * words_per_row(n), ranks)) for m, n in model.shapes]
    messages = model.trained_planes * sum(4 * codec.message_words(of) for of in segments)
    whole = model.trained_planes * sum(4 * of.partition.elements_per_rank for of in segments)
    found: dict[str, float] = {}
    if node_size := comm.summing_nodes(ranks):
        nodes = ranks // node_size
        found["signal_in_node"] = whole * nodes * (node_size - 1) * micro_batches
        found["signal"] = messages * (nodes - 1) * micro_batches
    else:
        found["signal"] = messages * (ranks - 1) * micro_batches
    found["statistics"] = 2 * others * 8 * sum(m + n for m, n in model.shapes)
    found["flip_counts"] = 2 * others * (_HISTOGRAM_BYTES + 24) * len(model.shapes) * model.trained_planes
    if stage < 3 or comm.resident_planes == "all":
        dense = model.trained_planes * model.plane_bytes / ranks
        found["flips"] = (ranks - 1) * min(dense, 2 * flip_rate * model.trained_planes * model.weights / ranks)
    gradient = {"fp32": 4, "bf16": 2}[comm.float_gradients] * model.floats
    found["float gradients"] = (2 if stage < 3 else 1) * others * gradient
    found["floats"] = others * 4 * model.floats
    if stage == 3:
        resident = {"none": 0, "frozen": model.planes - model.trained_planes, "all": model.planes}
        gathered = model.planes - resident[comm.resident_planes]
        if comm.resident_floats == "none":
            found["frozen floats"] = micro_batches * others * model.frozen_gathered
        # Forward and backward: what is computed again uses what backward gathered (of all blocks but the first).
        found["planes"] = 2 * micro_batches * others * gathered * model.plane_bytes
    return {phase: round(size) for phase, size in found.items()}


def dense_step_bytes(model: TrainedModel, ranks: int, stage: int, micro_batches: int = 1) -> int:
    """The same of DeepSpeed's bf16 training: gradients all-reduced and weights gathered once (stages 1, 2), or weights
    gathered twice and gradients scattered (3), of the matrices' weights alone."""
    passes = 3 if stage < 3 else 1 + 2 * micro_batches
    return round(passes * 2 * model.weights * (ranks - 1) / ranks)

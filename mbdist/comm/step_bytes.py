"""What a rank sends in a step, counted on paper: for plans, and for more ranks than anybody has at hand.

Collectives cost what ring and pairwise algorithms send at least, as ``Communicator`` counts them. Tests hold the
numbers to those of real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mbdist.comm.codecs import CODECS, Segments
from mbdist.comm.partition import WordPartition
from mbdist.config.comm import CommConfig
from mbdist_kernels import words_per_row

_HISTOGRAM_BYTES = 8 * 64  # of the candidates of a matrix


@dataclass(frozen=True)
class TrainedMatrix:
    """A multi-Boolean matrix."""

    rows: int  # m
    columns: int  # n
    planes: int  # K
    signals: int = 1  # accumulators a weight, each with a signal of its own
    trained_planes: int = 1  # those that accumulators may flip

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def plane_words(self) -> int:
        return self.rows * words_per_row(self.columns)


@dataclass(frozen=True)
class GatheredFloats:
    """Bytes of floats that stage 3 gathers for every micro-batch."""

    whole: int = 0
    in_passes: int = 0  # as often as forward and backward use them


@dataclass(frozen=True)
class TrainedModel:
    """What of a model crosses the wire."""

    matrices: Sequence[TrainedMatrix]
    turns: int = 1  # a matrix sends its signal and flips in one step of so many
    other_floats: int = 0  # trained ones besides the scales
    frozen: GatheredFloats = GatheredFloats()
    large: GatheredFloats = GatheredFloats()  # of ``other_floats``, those that are not kept from step to step

    @property
    def weights(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def floats(self) -> int:
        """Trained floats: scales and others."""
        scales = sum(matrix.planes * (matrix.rows + matrix.columns) for matrix in self.matrices)
        return scales + self.other_floats


def llama_matrices(layers: int, hidden: int, intermediate: int, key_values: int, planes: int) -> list[TrainedMatrix]:
    """Matrices of a LLaMA; ``key_values``: columns of keys, and of values."""
    attention = [(hidden, hidden), (key_values, hidden), (key_values, hidden), (hidden, hidden)]
    feed_forward = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return [TrainedMatrix(m, n, planes) for m, n in attention + feed_forward] * layers


def step_bytes(
    model: TrainedModel,
    ranks: int,
    stage: int,
    comm: CommConfig,  # node_size as a number or None
    micro_batches: int = 1,  # a rank
    flip_rate: float = 0.0,  # flips a trained weight in this step
) -> dict[str, int]:
    """{phase: bytes that a rank sends}, the mean over ``model.turns`` steps; phases as in metrics.jsonl, DeepSpeed's by
    what they carry."""
    others = (ranks - 1) / ranks
    codec = CODECS[comm.codec]
    messages = whole = accumulators = flipped_words = trained_weights = 0
    for matrix in model.matrices:
        partition = WordPartition(matrix.plane_words, ranks)
        messages += 4 * matrix.signals * codec.message_words(Segments(matrix.rows, matrix.columns, partition))
        whole += 4 * matrix.signals * partition.elements_per_rank
        accumulators += matrix.signals
        flipped_words += matrix.trained_planes * matrix.plane_words
        trained_weights += matrix.signals * matrix.weights
    found: dict[str, float] = {}
    if node_size := comm.summing_nodes(ranks):
        nodes = ranks // node_size
        found["signal_in_node"] = whole * nodes * (node_size - 1) * micro_batches / model.turns
        found["signal"] = messages * (nodes - 1) * micro_batches / model.turns
    else:
        found["signal"] = messages * (ranks - 1) * micro_batches / model.turns
    found["statistics"] = 2 * others * 8 * sum(matrix.rows + matrix.columns for matrix in model.matrices)
    found["flip_counts"] = 2 * others * (_HISTOGRAM_BYTES + 24) * accumulators / model.turns
    if stage < 3 or comm.resident_planes == "all":
        found["flips"] = others * min(4 * flipped_words, 2 * flip_rate * trained_weights) / model.turns
    gradient = {"fp32": 4, "bf16": 2}[comm.float_gradients] * model.floats
    found["float gradients"] = _reductions(stage, micro_batches) * (2 if stage < 3 else 1) * others * gradient
    found["floats"] = others * 4 * model.floats
    if stage == 3:
        planes = 4 * _gathered_words(model, comm)
        frozen = model.frozen if comm.resident_floats == "none" else GatheredFloats()
        once = comm.keeps_gathered(planes + frozen.whole + model.large.whole)
        found["frozen floats"] = micro_batches * others * (frozen.whole if once else frozen.in_passes)
        found["floats"] -= others * model.large.whole
        found["floats"] += micro_batches * others * (model.large.whole if once else model.large.in_passes)
        # Forward and backward: what is computed again uses what backward gathered (of all blocks but the first).
        found["planes"] = (1 if once else 2) * micro_batches * others * planes
    return {phase: round(size) for phase, size in found.items()}


def _reductions(stage: int, micro_batches: int) -> int:
    """Of gradients in a step. Where they are partitioned, DeepSpeed keeps no sum of micro-batches unreduced."""
    return micro_batches if stage >= 2 else 1


def _gathered_words(model: TrainedModel, comm: CommConfig) -> int:
    """Words of the planes that no rank keeps whole at stage 3."""
    match comm.resident_planes:
        case "all":
            return 0
        case "frozen":
            return sum(matrix.trained_planes * matrix.plane_words for matrix in model.matrices)
        case _:
            return sum(matrix.planes * matrix.plane_words for matrix in model.matrices)


def dense_step_bytes(model: TrainedModel, ranks: int, stage: int, micro_batches: int = 1) -> int:
    """The same of DeepSpeed's bf16 training: gradients all-reduced and weights gathered once (stages 1, 2), or weights
    gathered twice and gradients scattered (3), of the matrices' weights alone."""
    reductions = _reductions(stage, micro_batches)
    passes = 1 + 2 * reductions if stage < 3 else 2 * micro_batches + reductions
    return round(passes * 2 * model.weights * (ranks - 1) / ranks)

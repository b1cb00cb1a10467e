"""Seconds of a step on paper: operations at measured rates or at a data sheet's, bytes at the rate of the links."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from mbdist.comm.step_bytes import GatheredFloats, TrainedMatrix, TrainedModel, step_bytes
from mbdist.config.optimizers import BooleanOptimizerConfig
from mbdist.config.schema import RunConfig
from mbdist.engine.deepspeed_config import gathered_in_passes
from mbdist.fake_tensors import with_fake_tensors
from mbdist.model.layers import boolean_layers, embedding_and_head
from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim.accumulated import plane_sets, trained_planes
from mbdist.plan.model import PlannedModel
from mbdist.plan.rates import Rates

_FLIP_RATE = 1e-4  # flips a weight and step, at the most, in runs that were measured
_PAIRWISE = ("signal", "signal_in_node")  # every worker to every other one; all else goes round in rings


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    tokens: int  # of the global batch
    sent: dict[str, int]  # bytes that a worker sends, by phase
    compute_s: float
    communication_s: float  # if nothing of it overlapped with computing


def trained_model(planned: PlannedModel, dtype: torch.dtype) -> TrainedModel:
    """What of the model crosses the wire; ``dtype``: of frozen floats."""

    def count(_memory) -> TrainedModel:
        student = planned.student(dtype)
        layers = [layer for _, layer in boolean_layers(student)]
        floats = [p for p in student.parameters() if p.is_floating_point()]
        scales = sum(layer.scale_out.numel() + layer.scale_in.numel() for layer in layers)
        embedding, head = embedding_and_head(student)
        # Backward passes nothing on to frozen embeddings, unless checkpoints ask for gradients of their outputs. The
        # head's backward follows on its forward.
        backward = planned.config.train.activation_checkpointing
        uses: Counter[int] = Counter({id(head): 1})
        uses[id(embedding)] += 1 + (backward or embedding.requires_grad)

        def gathered(of_these: list[nn.Parameter]) -> GatheredFloats:
            passes = sum((uses[id(p)] or 2) * p.nbytes for p in of_these)
            return GatheredFloats(sum(p.nbytes for p in of_these), passes)

        return TrainedModel(
            [_trained_matrix(layer, planned.config.boolean) for layer in layers],
            planned.config.boolean.turns,
            other_floats=sum(p.numel() for p in floats if p.requires_grad) - scales,
            frozen=gathered([p for p in floats if not p.requires_grad]),
            large=gathered([p for p in gathered_in_passes(floats) if p.requires_grad]),
        )

    return with_fake_tensors(count)


def _trained_matrix(layer: MultiBooleanLinear, config: BooleanOptimizerConfig) -> TrainedMatrix:
    sets = plane_sets(config.planes, layer.num_planes)
    trained = trained_planes(config.planes, layer.num_planes)
    return TrainedMatrix(layer.out_features, layer.in_features, layer.num_planes, len(sets), len(trained))


def plan_step(
    planned: PlannedModel,
    model: TrainedModel,  # of ``planned``
    workers: int,
    workers_a_machine: int,
    rates: Rates,
    inside: float,  # bytes a second between workers of a machine
    outside: float,  # between a machine and the others
) -> StepPlan:
    """Of a run on so many workers."""
    config = planned.config.at_size(workers)
    sent = step_bytes(model, workers, config.cluster.zero_stage, config.comm, config.accumulation, _FLIP_RATE)
    return StepPlan(
        config.tokens_per_step,
        sent,
        config.accumulation * _micro_batch_s(planned, model, config, rates) + _flips_s(model, config, rates),
        sum(
            _seconds(phase, size, workers, workers_a_machine, bool(config.comm.summing_nodes(workers)), inside, outside)
            for phase, size in sent.items()
        ),
    )


def _micro_batch_s(planned: PlannedModel, model: TrainedModel, config: RunConfig, rates: Rates) -> float:
    """A worker's forward and backward passes: products with the matrices and the head, attention between half of all
    pairs of tokens. A live teacher is taken for a float model of the student's shapes."""
    text = planned.architecture.get_text_config(decoder=True)
    tokens = config.train.micro_batch * config.data.window
    forwards, teacher = 1 + config.train.activation_checkpointing, planned.teacher is not None
    products: Counter[tuple[str, tuple[int, int], int]] = Counter()
    for matrix in model.matrices:
        shape = matrix.rows, matrix.columns
        for kind, times in (("forward", forwards), ("dX", 1), ("dW", 1), ("dense", teacher)):
            products[kind, shape, matrix.planes] += times
    products["dense", (text.vocab_size, text.hidden_size), 1] += 3 + teacher
    attention = 2 * text.num_hidden_layers * text.hidden_size * config.data.window * tokens
    computed = sum(times * rates.product(*product, tokens) for product, times in products.items())
    return computed + rates.operations((2 + forwards + teacher) * attention)


def _flips_s(model: TrainedModel, config: RunConfig, rates: Rates) -> float:
    """A worker adds the contributions of all workers, or machines, to its part of the accumulators."""
    workers = config.cluster.most_workers
    contributions = config.accumulation / (config.comm.summing_nodes(workers) or 1)  # to all of a matrix
    matrices = Counter((matrix.rows, matrix.columns) for matrix in model.matrices for _ in range(matrix.signals))
    updates = sum(count * rates.flips(shape, config.boolean.accumulator) for shape, count in matrices.items())
    return contributions * updates / model.turns


def _seconds(
    phase: str, size: int, workers: int, workers_a_machine: int, summed: bool, inside: float, outside: float
) -> float:
    """``size``: bytes that each worker sends. Between machines a ring crosses a link once; of pairwise messages those
    of all workers of a machine share it, and all of them leave it where they are ``summed`` inside before."""
    if workers <= workers_a_machine or phase == "signal_in_node":
        return size / inside
    if phase not in _PAIRWISE:
        return size / min(outside, inside)
    leaving = size if summed else size * (workers - workers_a_machine) / (workers - 1)
    return max(leaving * workers_a_machine / outside, size / inside)

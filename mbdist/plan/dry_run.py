"""A run's start and its first passes with workers and tensors that are fake: the real engine, optimizer and codecs,
what worker 0 would hold and send. DeepSpeed partitions as it would; nothing is computed.

In a process of its own: the process group and DeepSpeed's settings are the process's.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from mbdist.bench.process import in_own_process
from mbdist.comm.communicator import Communicator
from mbdist.comm.step_bytes import TrainedModel, step_bytes
from mbdist.config import RunConfig, with_changes
from mbdist.fake_tensors import LiveMemory, with_fake_tensors
from mbdist.optim import BooleanOptimizer
from mbdist.plan.memory import MemoryPlan
from mbdist.plan.model import PlannedModel, planned_model


class _AgreeingCommunicator(Communicator):
    """Its collectives go to the fake process group, and buckets of signals are noted. Objects cannot go: their sizes
    would have to be read."""

    def __init__(self, timeout_s: float):
        super().__init__(timeout_s)
        self.buckets: dict[str, list[int]] = {}  # bytes of each, by phase

    def all_to_all(self, send, receive, phase):
        self.buckets.setdefault(phase, []).append(send.nbytes)
        return super().all_to_all(send, receive, phase)

    def all_gather_objects(self, value, phase):
        return [value] * self.world_size


def run_dry(planned: PlannedModel, workers: int, dtype: torch.dtype) -> dict:
    """Of worker 0, in bytes: ``kept`` between steps, ``start_peak`` until the first pass, ``peak`` in backward. Of one
    micro-batch ``sent`` by phase and ``buckets`` of signals, each one's size, by phase. ``owned_words`` of the planes,
    of the worker that owns fewest and of the one that owns most. ``seconds`` that the dry run took."""
    here = {"cluster.device": "cpu", "boolean.offload_accumulators": False, "train.offload_activations": False}
    config = with_changes(planned.config.at_size(workers), here)
    return in_own_process(_dry_run, config, str(dtype).removeprefix("torch."))


def _dry_run(config: RunConfig, dtype_name: str) -> dict:
    workers, started = config.cluster.most_workers, time.perf_counter()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(workers), DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", rank=0, world_size=workers, store=FakeStore())
    dtype = getattr(torch, dtype_name)
    with init_empty_weights(include_buffers=False):
        student = planned_model(config).student(dtype)
    found = with_fake_tensors(lambda memory: _start_and_step(student, config, dtype, memory))
    return {**found, "seconds": time.perf_counter() - started}


class _NoWeights:
    def fill(self, name: str, first: int, out: torch.Tensor) -> None:
        """Nothing is read."""


def _start_and_step(student: PreTrainedModel, config: RunConfig, dtype: torch.dtype, memory: LiveMemory) -> dict:
    from mbdist.engine import Engine, place
    from mbdist.engine.zero3 import ask_no_other_ranks
    from mbdist.model.layers import boolean_layers
    from mbdist.model.readout import Readout

    workers = config.cluster.most_workers
    communicator = _AgreeingCommunicator(config.comm.timeout_s)
    place(student, _NoWeights(), config, torch.device("cpu"))
    ask_no_other_ranks()
    student.to = lambda *_args, **_kwargs: student  # DeepSpeed moves the model, and fake tensors cannot be moved
    student.train()
    readout = Readout(student)
    if config.train.activation_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    boolean = BooleanOptimizer(
        dict(boolean_layers(student)),
        config.boolean,
        config.comm,
        communicator,
        total_steps=config.train.steps,
        micro_batches=config.accumulation,
        seed=config.seed,
        gradient_scale=workers,
    )
    alike = {name: 1.0 for name, parameter in student.named_parameters() if parameter.requires_grad}
    engine = Engine(student, boolean, config, communicator, alike)
    start_peak = memory.peak_bytes
    moments = 2 * sum(p.nbytes for group in engine.optimizer.param_groups for p in group["params"])
    kept = memory.restart_peak() + moments

    def micro_batch() -> None:
        boolean.curvature.steps = 1  # the first step only measures
        ids = torch.zeros(config.train.micro_batch, config.data.window, dtype=torch.int64)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states = readout(engine.forward, lambda states, _head: states, ids, use_cache=False)[1]
        memory.restart_peak()
        engine.backward(states.mean())
        boolean.finish_micro_batch()
        communicator.all_reduce_sum(boolean.curvature.sums, "statistics")  # whether it is finite cannot be asked here

    micro_batch()  # in which DeepSpeed learns what is used when
    boolean.skip()
    communicator.buckets.clear()
    before = dict(communicator.bytes_sent)
    micro_batch()
    sent = {phase: size - before.get(phase, 0) for phase, size in communicator.bytes_sent.items()}
    return {
        "kept": kept,
        "start_peak": start_peak,
        "peak": memory.peak_bytes + moments,
        "sent": {phase: size for phase, size in sent.items() if size},
        "buckets": communicator.buckets,
        "owned_words": _owned_words(boolean, workers),
    }


def _owned_words(boolean: BooleanOptimizer, workers: int) -> tuple[int, int]:
    """(fewest, most) of a worker, planes of all layers together."""
    planes = [layer.num_planes for layer in boolean.layers.values()]
    of_workers = [
        sum(k * partition.words_owned(rank) for k, partition in zip(planes, boolean.partitions, strict=True))
        for rank in range(workers)
    ]
    return min(of_workers), max(of_workers)


def beside_plan(found: dict, memory: MemoryPlan, model: TrainedModel, config: RunConfig) -> list[dict]:
    """What ``run_dry`` found beside what is planned for the same (null: nothing is), in bytes or words."""
    workers = config.cluster.most_workers
    sent = step_bytes(model, workers, config.cluster.zero_stage, config.comm)
    # Small trained floats are gathered after a step, and none is taken.
    sent["floats"] += sent.get("frozen floats", 0) - (4 * model.floats - model.large.whole) * (workers - 1) // workers
    words = sum(matrix.planes * -(-matrix.plane_words // workers) for matrix in model.matrices)
    planned = [
        ("kept between steps", found["kept"], memory.of_the_student),
        ("while starting", found["start_peak"], None),
        ("in the last block's backward", found["peak"], memory.student_in_backward),
        ("words that a worker owns, at least", found["owned_words"][0], None),
        ("words that a worker owns, at most", found["owned_words"][1], words),
    ]
    for phase, sizes in found["buckets"].items():
        planned += [
            (f"buckets: {phase}", len(sizes), None),
            (f"smallest bucket: {phase}", min(sizes), None),
            (f"largest bucket: {phase}", max(sizes), None),
        ]
    planned += [(f"sent: {phase}", size, sent.get(phase)) for phase, size in found["sent"].items()]
    return [dict(zip(("what", "found", "planned"), row, strict=True)) for row in planned]

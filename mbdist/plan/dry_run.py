"""A run's start and its first pass with workers and tensors that are fake: the real engine, optimizer and codecs, what
worker 0 would hold and send. DeepSpeed partitions as it would; nothing is computed.

In a process of its own: the process group and DeepSpeed's settings are the process's.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from mbdist.bench.process import in_own_process
from mbdist.comm.communicator import Communicator
from mbdist.config.schema import RunConfig
from mbdist.plan.fake import LiveMemory, with_fake_tensors
from mbdist.plan.memory import MemoryPlan
from mbdist.plan.model import PlannedModel, planned_model


class _AgreeingCommunicator(Communicator):
    """Its collectives go to the fake process group. Objects cannot: their sizes would have to be read."""

    def all_gather_objects(self, value, phase):
        return [value] * self.world_size


def dry_run(planned: PlannedModel, workers: int, dtype: torch.dtype) -> dict:
    """Of worker 0, in bytes: ``kept`` between steps, ``start_peak`` until the first pass, ``peak``, and ``sent`` for
    one micro-batch by phase (DeepSpeed's by operation); ``seconds`` that the dry run took."""
    here = {"cluster.device": "cpu", "boolean.offload_accumulators": False, "train.offload_activations": False}
    config = planned.config.at_size(workers).changed(here)
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
    from mbdist.model.layers import boolean_layers
    from mbdist.optim import BooleanOptimizer
    from mbdist.train.readout import Readout

    workers = config.cluster.most_workers
    communicator = _AgreeingCommunicator(config.comm.timeout_s)
    place(student, _NoWeights(), config, torch.device("cpu"), communicator)
    student.to = lambda *_args, **_kwargs: student  # DeepSpeed moves the model, and fake tensors cannot be moved
    student.train()
    readout = Readout(student)
    readout.cut = True  # the head's memory is that of a chunk; a probe would compare addresses
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
    boolean.curvature.steps = 1  # the first step only measures
    moments = 2 * sum(p.nbytes for group in engine.optimizer.param_groups for p in group["params"])
    kept = memory.restart_peak() + moments
    ids = torch.zeros(config.train.micro_batch, config.data.window, dtype=torch.int64)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        states = readout(engine.forward, lambda states, _head: states, ids, use_cache=False)[1]
    engine.backward(states.mean())
    boolean.finish_micro_batch()
    communicator.all_reduce_sum(boolean.curvature.sums, "statistics")  # whether it is finite cannot be asked here
    return {
        "kept": kept,
        "start_peak": start_peak,
        "peak": memory.peak_bytes + moments,
        "sent": dict(communicator.bytes_sent),
    }


def show_dry_run(console: Console, planned: PlannedModel, workers: int, dtype: torch.dtype, plan: MemoryPlan) -> None:
    """Run it and print it beside the plan."""
    found = dry_run(planned, workers, dtype)
    table = Table(f"dry run, {found['seconds']:.0f} s", "GiB", "planned")
    table.add_row("kept between steps", f"{found['kept'] / 2**30:,.2f}", f"{plan.of_the_student / 2**30:,.2f}")
    table.add_row("while starting", f"{found['start_peak'] / 2**30:,.2f}", "")
    table.add_row(
        "in the last block's backward", f"{found['peak'] / 2**30:,.2f}", f"{plan.student_in_backward / 2**30:,.2f}"
    )
    for phase, size in found["sent"].items():
        table.add_row(f"sent: {phase.replace('_', ' ')}", f"{size / 2**30:,.3f}", "")
    console.print(table)

"""``mbdist plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mbdist.config import RunConfig, with_changes
from mbdist.errors import UserError
from mbdist.plan.advice import advice
from mbdist.plan.hardware import Gpu, gpu_named, link_rate
from mbdist.plan.memory import MemoryPlan, plan_memory
from mbdist.plan.model import PlannedModel, planned_model
from mbdist.plan.rates import DataSheet, Measured, Rates
from mbdist.plan.report import activations_line, advice_lines, dry_run_table, memory_table, step_table
from mbdist.plan.room import INTERPRETER_BYTES, Room, host_memory
from mbdist.plan.step_time import plan_step, trained_model
from mbdist.train.environment import compute_dtype


def plan_command(
    config: RunConfig,
    gpu: str,
    nodes: int,
    link: str,
    dry_run: bool,
    rates_file: Path | None = None,  # as of ``mbdist bench kernels``
    json_file: Path | None = None,  # to write the plan to
) -> bool:
    """Print the plan; whether the run fits. Raises UserError for arguments that make no plan."""
    console = Console(highlight=False, soft_wrap=True)
    most = config.cluster.most_workers
    if most % nodes:
        raise UserError(f"cluster.workers = {most} cannot be shared by --nodes {nodes}: set cluster.workers")
    on_a_machine = most // nodes
    outside = link_rate(link)
    hardware = gpu_named(gpu) if gpu != "cpu" else None
    precision = "bf16" if hardware and config.train.precision == "auto" else config.train.precision
    dtype, device = compute_dtype(precision, torch.device("cpu")), "cuda" if hardware else "cpu"
    planned, memory = _fullest(config, on_a_machine, dtype, device)
    config, workers = planned.config, planned.config.cluster.most_workers
    together = min(workers, on_a_machine)
    rates, inside = _rates(gpu, hardware, rates_file, together)
    model = trained_model(planned, dtype)
    console.print(
        f"{config.model.path}: {model.weights / 1e9:,.2f} G weights in {len(model.matrices)} matrices, "
        f"K = {max(matrix.planes for matrix in model.matrices)}, {workers} worker(s) on "
        f"{-(-workers // on_a_machine)} machine(s), ZeRO stage {config.cluster.zero_stage}"
    )
    memory_table(console, memory, workers)
    console.print(activations_line(memory, _otherwise_checkpointed(planned, workers, dtype, device), config))
    found: dict = {"model": config.model.path, "workers": workers, "zero_stage": config.cluster.zero_stage}
    found["memory"] = memory.categories() | {"in all": memory.total}
    if dry_run:
        from mbdist.plan.dry_run import beside_plan, run_dry

        dry = run_dry(planned, workers, dtype)
        found["dry_run"] = beside_plan(dry, memory, model, config)
        found["dry_run_s"] = round(dry["seconds"])
        dry_run_table(console, found["dry_run"], dry["seconds"])
    if hardware is None:
        room = Room(host_memory(), together, INTERPRETER_BYTES)
        there = (
            f"this machine has {room.free_bytes / 2**30:,.1f} GiB free, and {together} worker(s) take "
            f"{room.taken(memory) / 2**30:,.1f} with their interpreters and libraries"
        )
    else:
        room = Room(hardware.usable_bytes)
        there = f"{gpu} has {room.free_bytes / 2**30:,.1f} GiB besides what CUDA and fragments take"
    if rates is None:
        console.print("no time is planned on a CPU without --rates")
    else:
        step = plan_step(planned, model, workers, on_a_machine, rates, inside, outside)
        found["step"] = asdict(step) | {"rates": rates.source}
        step_table(console, step, rates)
    found["fits"] = room.holds(memory)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if room.holds(memory):
        console.print(f"It fits: {there}.")
        return True
    console.print(f"It does NOT fit: {there}. What would make it, the cheapest first, each with those above it:")
    changes = advice(planned, memory, workers, dtype, device, room.holds)
    console.print(advice_lines(changes, room), markup=False)
    return False


def _rates(gpu: str, hardware: Gpu | None, file: Path | None, together: int) -> tuple[Rates | None, float]:
    """(of computing, bytes a second between workers of a machine)."""
    if file is None:
        return (DataSheet(gpu, hardware.bf16_flops), hardware.link_rate) if hardware else (None, 0.0)
    measured = Measured(file, sharing=1 if hardware else together)
    if measured.device.startswith("cpu") != (hardware is None):
        raise UserError(f"--rates {file} is of {measured.device}, and the plan is for --gpu {gpu}")
    return measured, hardware.link_rate if hardware else measured.copy_rate


def _fullest(config: RunConfig, on_a_machine: int, dtype: torch.dtype, device: str) -> tuple[PlannedModel, MemoryPlan]:
    """Of the numbers of workers that the run may have, the one of which each holds most: the fewest, where something is
    partitioned, or the most, who receive more messages."""
    plans = []
    for workers in sorted({config.cluster.fewest_workers, config.cluster.most_workers}, reverse=True):
        of_size = config.at_size(workers)
        if config.comm.node_size == "auto":
            of_size = with_changes(of_size, {"comm.node_size": min(workers, on_a_machine)})
        planned = planned_model(of_size)
        plans.append((planned, plan_memory(planned, workers, dtype, device)))
    return max(plans, key=lambda of_size: of_size[1].total)


def _otherwise_checkpointed(planned: PlannedModel, workers: int, dtype: torch.dtype, device: str) -> MemoryPlan:
    """The same run with activation checkpointing if it has none, and without if it has."""
    other = {
        "train.activation_checkpointing": not planned.config.train.activation_checkpointing,
        "train.offload_activations": False,
    }
    return plan_memory(planned.with_config(with_changes(planned.config, other)), workers, dtype, device)

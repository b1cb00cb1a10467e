"""``mbdist plan``."""

from __future__ import annotations

import torch
from rich.console import Console

from mbdist.config.schema import RunConfig
from mbdist.errors import UserError
from mbdist.plan.advice import advice
from mbdist.plan.hardware import gpu_named, link_rate
from mbdist.plan.memory import plan_memory
from mbdist.plan.model import planned_model
from mbdist.plan.report import advice_lines, memory_table, step_table
from mbdist.plan.step_time import plan_step, trained_model
from mbdist.train.environment import compute_dtype


def plan_command(config: RunConfig, gpu: str, nodes: int, link: str, dry_run: bool) -> bool:
    """Print the plan; whether the run fits."""
    console = Console(highlight=False, soft_wrap=True)
    workers = config.cluster.most_workers
    if workers % nodes:
        raise UserError(f"cluster.workers = {workers} cannot be shared by --nodes {nodes}: set cluster.workers")
    if config.comm.node_size == "auto":
        config = config.changed({"comm.node_size": workers // nodes})
    rate = link_rate(link)
    hardware = gpu_named(gpu) if gpu != "cpu" else None
    precision = "bf16" if hardware and config.train.precision == "auto" else config.train.precision
    dtype, device = compute_dtype(precision, torch.device("cpu")), "cuda" if hardware else "cpu"
    planned = planned_model(config)
    model = trained_model(planned, dtype)
    console.print(
        f"{config.model.path}: {model.weights / 1e9:,.2f} G weights in {len(model.matrices)} matrices, "
        f"K = {max(matrix.planes for matrix in model.matrices)}, {workers} worker(s) on {nodes} machine(s), "
        f"ZeRO stage {config.cluster.zero_stage}"
    )
    memory = plan_memory(planned, workers, dtype, device)
    memory_table(console, memory, workers)
    if dry_run:
        from mbdist.plan.dry_run import show_dry_run

        show_dry_run(console, planned, workers, dtype, memory)
    if hardware is None:
        console.print("besides the interpreter and its libraries; no time is planned on a CPU")
        return True
    step_table(console, plan_step(planned, model, workers, workers // nodes, hardware, rate))

    def fits(total: int) -> bool:
        return total <= hardware.usable_bytes

    free = f"{gpu} has {hardware.usable_bytes / 2**30:,.1f} GiB besides what CUDA and fragments take"
    if fits(memory.total):
        console.print(f"It fits: {free}.")
        return True
    console.print(f"It does NOT fit: {free}. What would make it, the cheapest first, each with those above it:")
    found = advice(planned, memory, workers, dtype, device, fits)
    advice_lines(console, found, bool(found) and fits(found[-1].memory.total))
    return False

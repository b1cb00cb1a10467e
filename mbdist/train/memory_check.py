"""Before the work starts: whether a run's workers will fit, by the plan of its config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from mbdist.config import RunConfig
from mbdist.errors import UserError
from mbdist.plan import plan_memory, planned_model
from mbdist.plan.advice import advice
from mbdist.plan.report import advice_lines
from mbdist.plan.room import Room, host_memory
from mbdist.train.environment import as_launched, compute_dtype

_LARGEST = 3  # categories that are named


def check_memory(config: RunConfig, device: torch.device, log: Callable[..., None], enforce: bool) -> None:
    """To be called by one worker of each machine. Raises UserError where the plan is above what is there; says so
    (event ``memory_is_short``, and in the worker's own log) where it comes near, or if not to ``enforce``."""
    if device.type == "cuda":
        room, where = Room(torch.cuda.mem_get_info(device)[0]), "the GPU"
    else:
        room, where = Room(host_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))), "this machine"
    config = as_launched(config)
    planned, dtype, workers = (
        planned_model(config),
        compute_dtype(config.train.precision, device),
        config.cluster.workers,
    )
    plan = plan_memory(planned, workers, dtype, device.type)
    needed, free = (f"{size / 2**30:,.2f} GiB" for size in (room.taken(plan), room.free_bytes))
    if room.holds_barely(plan) or (not room.holds(plan) and not enforce):
        log("memory_is_short", needed=room.taken(plan), free=room.free_bytes, where=where)
        print(f"the workers will take about {needed} of {where}, which has {free} free", file=sys.stderr, flush=True)
    elif not room.holds(plan):
        largest = sorted(plan.categories().items(), key=lambda category: -category[1])[:_LARGEST]
        named = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:,.2f}" for name, size in largest)
        changes = advice(planned, plan, workers, dtype, device.type, room.holds)
        raise UserError(
            f"too little memory: {room.workers} worker(s) would take {needed} of {where}, which has {free} free (a "
            f"worker's {named}). What would make it fit, the cheapest first, each with those above it:\n"
            f"{advice_lines(changes, room)}\ncluster.check_memory=false goes on anyway"
        )

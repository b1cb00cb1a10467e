"""Processes in which tests run code on ranks: standing ones, or fresh ones where what runs leaves traces."""

import functools
import io
import uuid
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from processes import warm

MOST_RANKS = 8


@functools.cache
def _standing() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(MOST_RANKS, warm)


def run_on_ranks(world_size, folder, main, *args, fresh=False):
    """What ``main(*args)`` returns on each rank of a gloo group of its own. ``fresh``: in processes of its own, for
    what uses DeepSpeed, which holds on to its groups when they are destroyed."""
    rendezvous = f"file://{folder}/init_{uuid.uuid4().hex}"
    with ProcessPoolExecutor(world_size, warm) if fresh else nullcontext(_standing()) as processes:
        running = [processes.submit(_run, rank, world_size, rendezvous, main, args) for rank in range(world_size)]
        return [torch.load(io.BytesIO(result.result()), weights_only=False) for result in running]


def _run(rank, world_size, rendezvous, main, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        result = io.BytesIO()
        torch.save(main(*args), result)
        return result.getvalue()
    finally:
        dist.destroy_process_group()

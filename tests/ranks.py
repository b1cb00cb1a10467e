"""Standing processes in which tests run code on ranks."""

import functools
import io
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from processes import warm

MOST_RANKS = 8


@functools.cache
def _standing() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(MOST_RANKS, warm)


def run_on_ranks(world_size, folder, main, *args):
    """What ``main(*args)`` returns on each rank of a gloo group of its own."""
    rendezvous = f"file://{folder}/init_{uuid.uuid4().hex}"
    running = [_standing().submit(_run, rank, world_size, rendezvous, main, args) for rank in range(world_size)]
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
        deepspeed_comm = sys.modules.get("deepspeed.comm")  # lets go of what DeepSpeed holds of the groups, where used
        used = deepspeed_comm is not None and deepspeed_comm.is_initialized()
        (deepspeed_comm if used else dist).destroy_process_group()

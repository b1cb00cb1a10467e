"""DeepSpeed's collectives, counted where they enter its backend.

DeepSpeed has a log of its own, which waits for the device at every message to time it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import deepspeed.comm.comm as deepspeed_comm
import torch

from mbdist.comm.communicator import Communicator

_TensorOrMany = torch.Tensor | Sequence[torch.Tensor]


def count_traffic(communicator: Communicator) -> None:
    """From now on ``communicator`` counts what DeepSpeed sends too, by what it carries: "planes", other "floats",
    "float gradients" (with the few numbers that are reduced beside them). To be called once DeepSpeed has its group;
    a later communicator takes the place of an earlier one."""
    backend, ranks = deepspeed_comm.cdb, communicator.world_size
    # gloo's reduce-scatter is an all-reduce of which each rank keeps a part.
    scatters = 2 if communicator.distributed and torch.distributed.get_backend() == "gloo" else 1

    def gathered(part: torch.Tensor, times: float) -> None:
        communicator.count("planes" if part.dtype == torch.int32 else "floats", round(part.nbytes * times))

    def reduced(whole: torch.Tensor, times: float) -> None:
        communicator.count("float gradients", round(whole.nbytes * times * (ranks - 1) / ranks))

    _count_calls(backend, "all_gather_into_tensor", "input_tensor", 1, lambda part: gathered(part, ranks - 1))
    _count_calls(backend, "all_gather_coalesced", "input_tensors", 1, lambda part: gathered(part, ranks - 1))
    _count_calls(backend, "all_gather", "tensor", 1, lambda part: gathered(part, ranks - 1))
    _count_calls(backend, "all_reduce", "tensor", 0, lambda whole: reduced(whole, 2))
    _count_calls(backend, "reduce_scatter_tensor", "input_tensor", 1, lambda whole: reduced(whole, scatters))
    _count_calls(backend, "reduce_scatter", "input_list", 1, lambda part: reduced(part, scatters))


def _count_calls(
    backend: object, method: str, argument: str, place: int, count: Callable[[torch.Tensor], None]
) -> None:
    """Let ``count`` see the tensors that the argument, at a place or by its name, of every call holds."""
    call = getattr(type(backend), method).__get__(backend)  # without the counting of an earlier communicator

    def counted(*arguments, **named):
        tensors: _TensorOrMany = named[argument] if argument in named else arguments[place]
        for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            count(tensor)
        return call(*arguments, **named)

    setattr(backend, method, counted)

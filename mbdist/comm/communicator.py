"""The collectives that the Boolean optimizer uses, with every payload byte counted by phase.

A process group of its own: DeepSpeed issues collectives from backward hooks too, and two streams of collectives in one
group would have to agree on an order. With one rank nothing is sent and every call is the identity.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mbdist.comm.activity import Activity

T = TypeVar("T")


class Communicator:
    """Collectives over all data-parallel ranks. ``bytes_sent[phase]`` and ``bytes_received[phase]`` count what this
    rank's payload costs on the wire: what leaves it for other ranks and comes from them, by the ring or pairwise
    algorithm's minimum."""

    def __init__(self, timeout_s: float = 600, alone: bool = False):
        """``alone``: this process by itself, whether or not it is one of many."""
        self.distributed = dist.is_available() and dist.is_initialized() and not alone
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.timeout_s = timeout_s
        self.group = self._new_group(None) if self.world_size > 1 else None
        self.activity = Activity()
        self.bytes_sent: Counter[str] = Counter()
        self.bytes_received: Counter[str] = Counter()

    def _new_group(self, ranks: list[int] | None) -> dist.ProcessGroup:
        return dist.new_group(ranks, timeout=timedelta(seconds=self.timeout_s))

    def by_nodes(self, node_size: int) -> tuple[Communicator, Communicator]:
        """(over the ranks of this rank's node, over the ranks that have its place on every node), for nodes of
        ``node_size`` consecutive ranks. They share its counts and its activity. All ranks call it together."""
        nodes = [list(range(first, first + node_size)) for first in range(0, self.world_size, node_size)]
        places = [list(place) for place in zip(*nodes, strict=True)]
        node, place = divmod(self.rank, node_size)
        groups = [[self._new_group(ranks) for ranks in of_kind] for of_kind in (nodes, places)]  # all ranks make all
        inside, across = copy.copy(self), copy.copy(self)
        inside.group, inside.rank, inside.world_size = groups[0][node], place, node_size
        across.group, across.rank, across.world_size = groups[1][place], node, len(nodes)
        return inside, across

    def count(self, phase: str, num_bytes: int) -> None:
        """Of a collective in which every rank receives as much as it sends."""
        self.bytes_sent[phase] += num_bytes
        self.bytes_received[phase] += num_bytes

    def all_to_all(
        self,
        send: torch.Tensor,  # (R, L): row r goes to rank r
        receive: torch.Tensor,  # (R, L): row r will be from rank r
        phase: str,
    ) -> dist.Work | None:
        """Start the exchange, on two ranks or more; the handle to wait on, None if done."""
        self.count(phase, send.nbytes * (self.world_size - 1) // self.world_size)
        return dist.all_to_all_single(receive, send, group=self.group, async_op=True)

    def all_reduce_sum(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            self.count(phase, 2 * tensor.nbytes * (self.world_size - 1) // self.world_size)
            with self.activity.waiting(phase):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        """Stack every rank's tensor of one shape: (R, *shape)."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        self.count(phase, tensor.nbytes * (self.world_size - 1))
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        with self.activity.waiting(phase):
            dist.all_gather(list(gathered.unbind(0)), tensor, group=self.group)
        return gathered

    def all_gather_objects(self, value: T, phase: str) -> list[T]:
        """Every rank's value, of any kind and size that pickles: for the start of a run, not for its steps."""
        if self.world_size == 1:
            return [value]
        self.count(phase, len(pickle.dumps(value)) * (self.world_size - 1))
        gathered: list[T] = [value] * self.world_size
        with self.activity.waiting(phase):
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

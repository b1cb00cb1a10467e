"""Messages of many matrices leave together in buckets, while the backward pass goes on.

Every rank puts the same matrices into the same buckets, because the backward pass goes through the layers in the same
order on all of them. A bucket is full when the next matrix would exceed its size; a matrix larger than a bucket has one
to itself. The memory of a bucket that has been delivered serves the next: there are never more than ``in_flight``.
What a larger matrix took is given back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from mbdist.comm.communicator import Communicator

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Bucket(Generic[Item]):
    contents: list[tuple[Item, int]]  # words of a message
    received: torch.Tensor  # (R, words)
    handle: dist.Work | None
    memory: tuple[torch.Tensor, torch.Tensor]


class SignalExchange(Generic[Item]):
    """Sends encoded signals and delivers what all ranks sent to this one, in the order of sending."""

    def __init__(
        self,
        communicator: Communicator,
        bucket_bytes: int,  # of this rank's messages to all ranks
        in_flight: int,  # buckets on the wire before sending waits for the oldest
        deliver: Callable[[Item, torch.Tensor], None],  # takes (R, L) int32: row r came from rank r; then it is reused
        phase: str = "signal",  # under which bytes are counted
    ):
        self._communicator = communicator
        self._bucket_bytes = bucket_bytes
        self._in_flight = in_flight
        self._deliver = deliver
        self._phase = phase
        self._landed = 0  # buckets, since the last ``finish``
        self._filling: list[tuple[Item, torch.Tensor]] = []
        self._flying: deque[_Bucket[Item]] = deque()
        self._idle: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory to send from and to receive in, flat

    def send(
        self,
        item: Item,
        messages: torch.Tensor,  # (R, L) int32: row r for rank r
    ) -> None:
        """Put the messages into the bucket; ``item`` is given back with what arrives."""
        if self._communicator.world_size == 1:
            self._deliver(item, messages)
            return
        waiting = sum(queued.nbytes for _, queued in self._filling)
        if self._filling and waiting + messages.nbytes > self._bucket_bytes:
            self._start()
        self._filling.append((item, messages))

    def finish(self) -> None:
        """Send what is queued, and deliver everything."""
        if self._filling:
            self._start()
        while self._flying:
            self._land()
        self._landed = 0

    def _start(self) -> None:
        while len(self._flying) >= self._in_flight:
            self._land()
        contents = [(item, messages.shape[1]) for item, messages in self._filling]
        shape = (self._communicator.world_size, sum(words for _, words in contents))
        memory = self._idle.pop() if self._idle else (self._filling[0][1].new_empty(0),) * 2
        if memory[0].numel() < math.prod(shape):
            memory = memory[0].new_empty(math.prod(shape)), memory[0].new_empty(math.prod(shape))
        sent, received = (flat[: math.prod(shape)].view(shape) for flat in memory)
        torch.cat([messages for _, messages in self._filling], dim=1, out=sent)
        self._filling = []
        handle = self._communicator.all_to_all(sent, received, self._phase)
        self._flying.append(_Bucket(contents, received, handle, memory))

    def _land(self) -> None:
        bucket = self._flying.popleft()
        if bucket.handle is not None:
            with self._communicator.activity.waiting(f"{self._phase}, bucket {self._landed}"):
                bucket.handle.wait()
        self._landed += 1
        parts = bucket.received.split([words for _, words in bucket.contents], dim=1)
        for (item, _), part in zip(bucket.contents, parts, strict=True):
            self._deliver(item, part)
        if bucket.memory[0].nbytes <= self._bucket_bytes:  # not the whole matrix of a larger one, until the next step
            self._idle.append(bucket.memory)

"""Phase 2: the signals of all ranks reach the owners of the accumulators.

Flat: every rank writes its signal in the codec, an all-to-all carries it, and an owner gets one contribution a rank.

By nodes, where links between nodes are slow and links inside a node are not: the ranks of a node add their signals up
in fp32 first, each the segments of the owners that have its own place on any node; then it writes each sum in the codec
and sends it to that owner. One packed message a node crosses the slow links, and an owner gets one contribution a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from mbdist.comm.codecs import CastCodec, Segments, SignalCodec
from mbdist.comm.communicator import Communicator
from mbdist.comm.signal_exchange import SignalExchange
from mbdist_kernels import Signal, fold_key

Item = TypeVar("Item")
# Takes the contributions to this rank's segment, each fp32 (32 P,), in their order; one is valid until the next.
Deliver = Callable[[Item, Iterable[torch.Tensor]], None]


@dataclass(frozen=True)
class _Sent(Generic[Item]):
    item: Item
    segments: Segments
    columns: torch.Tensor
    key: int


class SignalReduction(Protocol):
    """Carries signals to owners, in the order of sending, which is the same on all ranks."""

    codec: SignalCodec
    contributions: int  # that an owner gets of one micro-batch

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        """Memory for a signal in the form in which it is sent."""

    def send(self, item, signal: Signal, segments: Segments, columns: torch.Tensor, key: int) -> None:
        """``columns``: the owner's part of the column factor. ``key``: of random bits of this signal."""

    def finish(self) -> None:
        """Deliver everything that was sent."""


class _Owner(Generic[Item]):
    """The receiving end: decodes the messages to this rank's segment."""

    def __init__(self, codec: SignalCodec, rank: int, deliver: Deliver[Item]):
        self.codec = codec
        self._rank = rank
        self._deliver = deliver

    def _receive(self, sent: _Sent[Item], messages: torch.Tensor) -> None:
        decoded = (self.codec.decode(message, sent.segments, self._rank, sent.columns) for message in messages)
        self._deliver(sent.item, decoded)


class FlatReduction(_Owner[Item]):
    """All ranks alike."""

    def __init__(
        self,
        communicator: Communicator,
        codec: SignalCodec,
        bucket_bytes: int,
        in_flight: int,
        deliver: Deliver[Item],
    ):
        super().__init__(codec, communicator.rank, deliver)
        self.contributions = communicator.world_size
        self._exchange = SignalExchange(communicator, bucket_bytes, in_flight, self._receive)

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        return self.codec.wanted(segments, row_factor, column_factor)

    def send(self, item: Item, signal: Signal, segments: Segments, columns: torch.Tensor, key: int) -> None:
        self._exchange.send(_Sent(item, segments, columns, key), self.codec.encode(signal, segments, key))

    def finish(self) -> None:
        self._exchange.finish()


class NodeReduction(_Owner[Item]):
    """Sums inside nodes of ``node_size`` consecutive ranks, then codes between them."""

    _whole = CastCodec(torch.float32)

    def __init__(
        self,
        communicator: Communicator,
        node_size: int,
        codec: SignalCodec,
        bucket_bytes: int,
        in_flight: int,
        deliver: Deliver[Item],
    ):
        inside, across = communicator.by_nodes(node_size)
        super().__init__(codec, communicator.rank, deliver)
        self.contributions = across.world_size
        self._node_size = node_size
        self._place = inside.rank
        self._inside = SignalExchange(inside, bucket_bytes, in_flight, self._sum, "signal_in_node")
        self._across = SignalExchange(across, bucket_bytes, in_flight, self._receive)

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        return self._whole.wanted(segments, row_factor, column_factor)

    def send(self, item: Item, signal: Signal, segments: Segments, columns: torch.Tensor, key: int) -> None:
        of_owners = self._whole.encode(signal, segments, key)  # (R, 32 P): nodes first, places in them second
        nodes = len(of_owners) // self._node_size
        of_places = of_owners.view(nodes, self._node_size, -1).transpose(0, 1).reshape(self._node_size, -1)
        self._inside.send(_Sent(item, segments, columns, key), of_places)

    def finish(self) -> None:
        self._inside.finish()
        self._across.finish()

    def _sum(self, sent: _Sent[Item], messages: torch.Tensor) -> None:
        """Of the ranks of this node, in their order: a row an owner, one on every node."""
        nodes = self.contributions
        total = messages[0].view(torch.float32).clone()
        for message in messages[1:]:
            total += message.view(torch.float32)
        owners = [node * self._node_size + self._place for node in range(nodes)]
        segments = zip(total.view(nodes, -1), owners, strict=True)
        coded = [
            self.codec.encode_segment(values, sent.segments, owner, fold_key(sent.key, owner))
            for values, owner in segments
        ]
        self._across.send(sent, torch.stack(coded))

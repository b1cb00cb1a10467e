"""What an owner keeps of a trained matrix between steps, and which planes of it may flip."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from mbdist.checkpoint import Checkpoint, Piece
from mbdist.comm.codecs import Segments
from mbdist.comm.partition import WordPartition
from mbdist.errors import UserError
from mbdist.model.linear import MultiBooleanLinear
from mbdist_kernels import ACCUMULATOR_FORMATS, WORD_BITS, AccumulatorFormat

_NONE = torch.empty(0, dtype=torch.int64)
_RECENT_STEPS = 16  # a bit that flips again within so many steps counts as flipped back


@dataclass
class Accumulated:
    """One accumulator a weight of a layer, this rank's part, and what its candidates may flip."""

    name: str
    number: int  # of the accumulator: part of the keys of its random bits
    layer: MultiBooleanLinear
    matrix: int  # number of the layer
    planes: list[int]  # those it may flip
    segments: Segments
    rank: int  # the owner: this one
    format: AccumulatorFormat
    accumulator: torch.Tensor  # of the owned part's 32 P weights, in that format
    step_size: float  # eta of this matrix
    beta_q15: int = 0  # decay of the next step: 1 - share of bits just flipped; 0 before the first
    columns: torch.Tensor | None = None  # (32 W,): the owner's part of the column factor, of this step's signals
    scales: tuple[torch.Tensor, torch.Tensor] | None = None  # (K, m), (K, n) as this step's backward saw them
    probe: torch.Tensor | None = None  # (32 P,) fp32: this step's signal, while it is probed
    recent: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))  # elements that flipped

    @property
    def partition(self) -> WordPartition:
        return self.segments.partition

    @property
    def first_element(self) -> int:
        """Of the owned part, in the flat matrix of whole words."""
        return self.partition.first_word(self.rank) * WORD_BITS

    @property
    def entries_owned(self) -> int:
        """Of the accumulator's tensor, without the padding of the last part."""
        return self.partition.words_owned(self.rank) * WORD_BITS // self.format.per_entry

    def flipped_back(self, elements: torch.Tensor) -> int:
        """How many of the elements that move now moved lately; remembers these."""
        back = int(torch.isin(elements, torch.cat(list(self.recent))).sum()) if self.recent else 0
        self.recent.append(elements)
        return back

    def state_pieces(self) -> list[Piece]:
        """The accumulator, and what flipped lately as rows of (element, age), in coordinates of the whole matrix."""
        ages = torch.cat([torch.full_like(flipped, age) for age, flipped in enumerate(self.recent)] or [_NONE])
        elements = torch.cat(list(self.recent) or [_NONE])
        flips = torch.stack([elements.long() + self.first_element, ages.long()], dim=1)
        return [
            Piece(f"accumulator/{self.name}", self._first_entry, self.accumulator[: self.entries_owned]),
            Piece(f"recent/{self.name}", 2 * self.first_element, flips),
        ]

    def shared_state(self) -> dict:
        """What all ranks have alike, as JSON."""
        return {"beta_q15": self.beta_q15, "step_size": self.step_size, "recent_steps": len(self.recent)}

    def load_state(self, shared: dict, saved: Checkpoint) -> None:
        """Restore what ``shared_state`` and ``state_pieces`` of any number of ranks gave. Raises UserError where the
        accumulators are of another format."""
        count = self.entries_owned
        accumulator = saved.read(f"accumulator/{self.name}", self._first_entry, count)
        if count and accumulator.dtype != self.format.dtype:
            (name,) = (name for name, known in ACCUMULATOR_FORMATS.items() if known is self.format)
            raise UserError(
                f"{saved.folder} has accumulators of {accumulator.dtype}, and boolean.accumulator = {name} is kept in "
                f"{self.format.dtype}: resume with the version that wrote it"
            )
        self.accumulator[:count].copy_(accumulator)
        self.beta_q15, self.step_size = shared["beta_q15"], shared["step_size"]
        flips = torch.cat([piece.view(-1, 2) for piece in saved.pieces(f"recent/{self.name}")])
        last = self.first_element + count * self.format.per_entry
        mine = flips[(flips[:, 0] >= self.first_element) & (flips[:, 0] < last)]
        self.recent.clear()
        for age in range(shared["recent_steps"]):
            elements = mine[mine[:, 1] == age, 0] - self.first_element
            self.recent.append(elements.to(self.layer.scale_out.device))

    @property
    def _first_entry(self) -> int:
        return self.first_element // self.format.per_entry


def plane_name(layer: str, k: int) -> str:
    """As the model names the parameter."""
    return f"{layer}.plane_{k}"


def plane_sets(chosen: str | list[int], num_planes: int) -> list[list[int]]:
    """For ``boolean.planes``: the planes that each accumulator of a layer of so many planes may flip."""
    match chosen:
        case "levels" | "alternating":
            return [list(range(num_planes))]
        case "last":
            return [[num_planes - 1]]
        case "all":
            return [[k] for k in range(num_planes)]
        case _:
            return [[k] for k in chosen if k < num_planes]


def trained_planes(chosen: str | list[int], num_planes: int) -> set[int]:
    """The planes that some accumulator may flip."""
    return {k for planes in plane_sets(chosen, num_planes) for k in planes}

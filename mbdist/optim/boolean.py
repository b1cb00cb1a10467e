"""Finetunes bits: signals in, flips out. No latent weights and no straight-through estimator.

Phases of a step, for every trained plane (one a layer), R ranks, A micro-batches a rank:

1. *Backward* hands over the signal of a layer once a micro-batch (``take``): G * outer(row_factor, column_factor).
2. *Reduce*: the signal is cut flat into R segments, aligned with the ownership of the plane's words (padded to whole
   parts); an all-to-all brings each owner its segment from every rank, and the owner adds the R contributions into its
   int8 accumulators in rank order. No sum of floats crosses ranks, so the result does not depend on the sharding:
   contribution g = a R + r counts in the order of g, rounded with random bits of (seed, step, g, matrix, element).
3. *Decide* (``step``): each owner counts its flip candidates; their sum over ranks gives the cut that holds the
   cap of flips; the owner flips what lies above it and resets those accumulators.
4. *Exchange*: the masks reach every copy of the plane (``PlaneStore.apply``).

Ownership is the flat cut of ZeRO-3 at every stage: a flip is decided once, by one rank, with DeepSpeed stage 0 too.
World size 1 runs the same code. Source of the rule: BOLD (arXiv 2405.16339, algorithm 8); arXiv 2505.22811, section 4.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from mbdist.comm.codecs import CODECS
from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import PlaneStore
from mbdist.comm.partition import WordPartition
from mbdist.config.schema import BooleanOptimizerConfig, CommConfig
from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim.curvature import Curvature
from mbdist.optim.flip_cap import Cut, add_lottery, cut_by_level
from mbdist.optim.schedule import warmup_cosine
from mbdist_kernels import (
    FIXED_ONE,
    LOTTERY_TICKETS,
    WORD_BITS,
    accumulate_signal,
    count_candidates,
    draw_tickets,
    find_candidates,
    fold_key,
    select_flips,
)

_LOTTERY = 1 << 32  # contribution number of the lottery's random bits: no micro-batch has it


@dataclass
class TrainedPlane:
    """State of one trained plane on this rank."""

    name: str
    layer: MultiBooleanLinear
    index: int
    partition: WordPartition
    accumulator: torch.Tensor  # (32 P,) int8, the owned part
    beta_q15: int = 0  # decay of the next step: 1 - share of bits just flipped; 0 before the first


@dataclass
class FlipReport:
    """What a step did."""

    flips: dict[str, int] = field(default_factory=dict)  # by layer name
    cap_rate: float = 0.0

    def total(self) -> int:
        return sum(self.flips.values())


class BooleanOptimizer:
    """Owns the accumulators of this rank's part of every trained plane, and is the layers' signal sink."""

    def __init__(
        self,
        layers: dict[str, MultiBooleanLinear],
        config: BooleanOptimizerConfig,
        comm: CommConfig,
        communicator: Communicator,
        total_steps: int,
        micro_batches: int,  # A
        seed: int,
        gradient_scale: float = 1.0,  # factor that backward gradients carry (DeepSpeed averages: R)
    ):
        self.config = config
        self.communicator = communicator
        self.codec = CODECS[comm.codec]
        self.in_flight = comm.in_flight
        self.total_steps = total_steps
        self.micro_batches = micro_batches
        self.seed = seed
        self.gradient_scale = gradient_scale
        self.step_count = 0
        self.micro_batch = 0
        device = next(iter(layers.values())).scale_out.device
        self.planes: list[TrainedPlane] = []
        for name, layer in layers.items():
            layer.trained_plane = layer.num_planes - 1
            layer.signal_sink = self
            words = layer.planes[-1].shape.numel()
            partition = WordPartition(words, communicator.world_size)
            accumulator = torch.zeros(partition.elements_per_rank, dtype=torch.int8, device=device)
            self.planes.append(TrainedPlane(name, layer, len(self.planes), partition, accumulator))
        self._by_layer = {id(plane.layer): plane for plane in self.planes}
        shapes = [(plane.layer.out_features, plane.layer.in_features) for plane in self.planes]
        self.curvature = Curvature(shapes, config.curvature_decay, device)
        self.store: PlaneStore | None = None  # set once the engine has placed the planes
        self._arriving: deque = deque()

    # Phase 1: the signal sink of the layers.

    def signal_buffer(self, layer: MultiBooleanLinear) -> torch.Tensor | None:
        if self.config.step_size == 0 or (self.config.signal == "curvature" and self.curvature.steps == 0):
            return None  # the first step only measures curvature
        plane = self._by_layer[id(layer)]
        flat = torch.empty(plane.partition.padded_elements, device=layer.scale_out.device)
        used = plane.partition.num_words * WORD_BITS
        flat[used:] = 0
        return flat[:used].view(layer.out_features, -1)

    def factors(self, layer: MultiBooleanLinear) -> tuple[torch.Tensor, torch.Tensor]:
        plane = self._by_layer[id(layer)]
        scale_out = layer.scale_out.detach()[layer.trained_plane]
        scale_in = layer.scale_in.detach()[layer.trained_plane]
        if self.config.signal == "curvature":
            scale_out, scale_in = self.curvature.factors(plane.index, scale_out, scale_in)
        return scale_out * (self.config.step_size / self.gradient_scale), scale_in

    def take(self, layer, signal, row_squares, column_squares, tokens) -> None:
        plane = self._by_layer[id(layer)]
        self.curvature.add(plane.index, row_squares, column_squares, tokens)
        if signal is None:
            return
        flat = signal.view(-1).as_strided((plane.partition.padded_elements,), (1,))
        segments = flat.view(self.communicator.world_size, -1)
        received, handle = self.communicator.all_to_all(self.codec.encode(segments), "signal")
        self._arriving.append((plane, received, handle))
        while len(self._arriving) > (self.in_flight if handle is not None else 0):
            self._accumulate_oldest()

    # Phase 2, the owner's side.

    def _accumulate_oldest(self) -> None:
        plane, received, handle = self._arriving.popleft()
        if handle is not None:
            handle.wait()
        ranks = self.communicator.world_size
        first_contribution = self.micro_batch * ranks
        keys = [self._key(first_contribution + rank, plane) for rank in range(ranks)]
        accumulate_signal(
            plane.accumulator,
            self.codec.decode(received),
            plane.beta_q15 if self.micro_batch == 0 else FIXED_ONE,
            self.config.max_step / (self.micro_batches * ranks),
            keys,
            plane.partition.first_word(self.communicator.rank) * WORD_BITS,
        )

    def _key(self, contribution: int, plane: TrainedPlane) -> int:
        return fold_key(self.seed, self.step_count, contribution, plane.index)

    def finish_micro_batch(self) -> None:
        """Wait for the signals still on the wire. To be called after every backward pass."""
        while self._arriving:
            self._accumulate_oldest()
        self.micro_batch += 1

    # Phases 3 and 4.

    def all_finite(self, loss: torch.Tensor) -> bool:
        """Reduce the step's statistics over ranks; False, on every rank, if a loss or a signal was not finite."""
        self.curvature.sums[-1] = loss.detach().double()
        self.communicator.all_reduce_sum(self.curvature.sums, "statistics")
        return bool(torch.isfinite(self.curvature.sums).all())

    def skip(self) -> None:
        """End a step that flips nothing. Accumulators keep what its micro-batches added before the step was given up
        (bounded by ``max_step``, and 0 for a signal that is not a number)."""
        self.curvature.discard()
        for plane in self.planes:
            plane.beta_q15 = FIXED_ONE  # its decay has been applied
        self.step_count += 1
        self.micro_batch = 0

    def step(self) -> FlipReport:
        """Decide and apply the flips of this step. ``all_finite`` comes first."""
        cap_rate = self.config.max_flip_rate * warmup_cosine(
            self.step_count, self.total_steps, self.config.warmup_fraction
        )
        report = FlipReport(cap_rate=cap_rate)
        if self.config.step_size > 0:
            cuts = self._cuts(cap_rate)
            self.store.apply(
                [
                    select_flips(plane.accumulator, self.store.owned_words(plane.index), cut.level, winners)
                    for plane, (cut, winners) in zip(self.planes, cuts, strict=True)
                ]
            )
            for plane, (cut, _) in zip(self.planes, cuts, strict=True):
                plane.beta_q15 = FIXED_ONE - round(cut.flips / plane.layer.num_weights * FIXED_ONE)
                report.flips[plane.name] = cut.flips
        tokens = self.curvature.tokens * self.communicator.world_size
        self.curvature.absorb(tokens, self.gradient_scale)
        self.step_count += 1
        self.micro_batch = 0
        return report

    def _cuts(self, cap_rate: float) -> list[tuple[Cut, torch.Tensor | None]]:
        """For every plane the cut, and this rank's winners of the lottery below it."""
        caps = [int(cap_rate * plane.layer.num_weights) for plane in self.planes]
        histograms = torch.stack(
            [count_candidates(plane.accumulator, self.store.owned_words(plane.index)) for plane in self.planes]
        )
        histograms = self.communicator.all_reduce_sum(histograms, "flip_counts").cpu()
        cuts = [cut_by_level(histogram, cap) for histogram, cap in zip(histograms, caps, strict=True)]
        undecided = [i for i, (_, lottery) in enumerate(cuts) if lottery]
        result = [(cut, None) for cut, _ in cuts]
        if undecided:
            entries = [self._lottery(self.planes[i], cuts[i][0].level - 1) for i in undecided]
            counts = torch.stack([tickets.bincount(minlength=LOTTERY_TICKETS) for _, tickets in entries])
            counts = self.communicator.all_reduce_sum(counts, "flip_counts").cpu()
            for i, (candidates, tickets), count in zip(undecided, entries, counts, strict=True):
                cut = add_lottery(cuts[i][0], count, caps[i])
                result[i] = (cut, candidates[tickets < cut.tickets])
        return result

    def _lottery(self, plane: TrainedPlane, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's candidates at the level, and their tickets."""
        candidates = find_candidates(plane.accumulator, self.store.owned_words(plane.index), level)
        first_element = plane.partition.first_word(self.communicator.rank) * WORD_BITS
        return candidates, draw_tickets(self._key(_LOTTERY, plane), candidates + first_element)

    # State.

    @property
    def num_trained_bits(self) -> int:
        return sum(plane.layer.num_weights for plane in self.planes)

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps, by category."""
        return {
            "accumulators": sum(plane.accumulator.nbytes for plane in self.planes),
            "curvature": self.curvature.smoothed.nbytes + self.curvature.sums.nbytes,
        }

    def state_dict(self) -> dict:
        """This rank's state: owned accumulators by layer with the words they cover, and what all ranks share."""
        rank = self.communicator.rank
        return {
            "step": self.step_count,
            "curvature_steps": self.curvature.steps,
            "curvature": self.curvature.smoothed.clone(),
            "planes": {
                plane.name: {
                    "first_word": plane.partition.first_word(rank),
                    "accumulator": plane.accumulator[: plane.partition.words_owned(rank) * WORD_BITS].clone(),
                    "beta_q15": plane.beta_q15,
                }
                for plane in self.planes
            },
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` of the same rank and world size gave. Raises ValueError where it does not fit."""
        mine, theirs = {plane.name for plane in self.planes}, set(state["planes"])
        if mine != theirs:
            raise ValueError(f"the optimizer state is of other layers: {sorted(mine ^ theirs)[:3]} ...")
        rank = self.communicator.rank
        for plane in self.planes:
            saved = state["planes"][plane.name]
            elements = plane.partition.words_owned(rank) * WORD_BITS
            if saved["first_word"] != plane.partition.first_word(rank) or saved["accumulator"].numel() != elements:
                raise ValueError(f"the accumulator of {plane.name} was saved by another rank or world size")
            plane.accumulator[:elements].copy_(saved["accumulator"])
            plane.beta_q15 = saved["beta_q15"]
        self.curvature.smoothed.copy_(state["curvature"])
        self.curvature.steps = state["curvature_steps"]
        self.step_count = state["step"]

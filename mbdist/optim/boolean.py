"""Finetunes bits: signals in, flips out. No latent weights and no straight-through estimator.

Phases of a step, for every accumulator (one a weight of a layer, or of each of its trained planes), R ranks, A
micro-batches a rank:

1. *Backward* hands over the signals of a layer once a micro-batch (``take``): G * outer(row_factor, column_factor).
2. *Reduce*: a signal is cut flat into R segments, aligned with the ownership of the planes' words (padded to whole
   parts), and written for the wire by a codec; an all-to-all brings each owner its segment from every rank, and the
   owner adds the R contributions into its accumulators in rank order. No sum of floats crosses ranks, so the result
   does not depend on the sharding: contribution g = a R + r counts in the order of g, rounded with random bits of
   (seed, step, g, matrix, element). (With ``comm.node_size`` a contribution is a machine's sum, and nodes stand for
   ranks in this.)
3. *Decide* (``step``): each owner ranks its flip candidates; counts summed over ranks give the cut that holds the cap
   of flips; the owner flips what lies above it and resets those accumulators.
4. *Exchange*: the masks reach every copy of the planes (``PlaneStore.apply``).

Ownership is the flat cut of ZeRO-3 at every stage: a flip is decided once, by one rank, with DeepSpeed stage 0 too.
World size 1 runs the same code. Source of the rule: BOLD (arXiv 2405.16339, algorithm 8); arXiv 2505.22811, section 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from mbdist.checkpoint import Checkpoint, Piece
from mbdist.comm.agreement import agree
from mbdist.comm.codecs import CODECS, Segments, SplitColumns
from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import PlaneStore
from mbdist.comm.partition import WordPartition
from mbdist.comm.signal_reduction import FlatReduction, NodeReduction, SignalReduction
from mbdist.config.comm import CommConfig
from mbdist.config.optimizers import BooleanOptimizerConfig
from mbdist.errors import UserError
from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim.accumulated import Accumulated, plane_name, plane_sets
from mbdist.optim.curvature import Curvature
from mbdist.optim.flip_cap import within_caps
from mbdist.optim.flip_report import FlipReport, histogram, predicted_change, quantiles
from mbdist.optim.integration import Integration, integration
from mbdist.optim.moves import Candidates, bit_moves, level_moves
from mbdist.optim.offload import HostMemory
from mbdist.optim.schedule import warmup_cosine
from mbdist_kernels import (
    ACCUMULATOR_FORMATS,
    FIXED_ONE,
    WORD_BITS,
    Signal,
    accumulate_signal,
    draw_tickets,
    find_candidates,
    flip_mask,
    fold_key,
    set_accumulated,
    words_per_row,
)

# Contribution numbers that no micro-batch has, for random bits of other uses.
_LOTTERY = 1 << 32
_CODEC = 1 << 33


def adapted(step_size: float, crowding: float, most: float) -> float:
    """The next step's eta where ``crowding`` times as many weights reached the threshold as may move. Between 2 and 4
    it stays: enough to choose from, and few enough that ranks tell them apart."""
    if crowding > 4:  # slowly: accumulators follow a smaller step with the delay of their decay
        return step_size * 0.8
    return min(most, step_size * 1.1) if crowding < 2 else step_size


class BooleanOptimizer:
    """Owns the accumulators of this rank's part of every trained matrix, and is the layers' signal sink."""

    def __init__(
        self,
        layers: dict[str, MultiBooleanLinear],
        config: BooleanOptimizerConfig,
        comm: CommConfig,  # node_size as a number or None
        communicator: Communicator,
        total_steps: int,
        micro_batches: int,  # A
        seed: int,
        gradient_scale: float = 1.0,  # factor that backward gradients carry (DeepSpeed averages: R)
    ):
        self.config = config
        self.communicator = communicator
        self.magnitudes = comm.magnitudes
        how = (CODECS[comm.codec], comm.bucket_bytes, comm.in_flight, self._accumulate)
        node_size = comm.summing_nodes(communicator.world_size)
        self.reduction: SignalReduction = (
            NodeReduction(communicator, node_size, *how) if node_size else FlatReduction(communicator, *how)
        )
        self.total_steps = total_steps
        self.micro_batches = micro_batches
        self.seed = seed
        self.gradient_scale = gradient_scale
        self.format = ACCUMULATOR_FORMATS[config.accumulator]
        self.step_count = 0
        self.micro_batch = 0
        self._first_order: list[int] | None = []  # matrices as the first backward pass reached them; None once agreed
        self.probing = False  # set before the backward passes of a step: keep its signal and predict what its flips do
        self.layers = layers
        self.accumulated: list[Accumulated] = []
        self.device = device = next(iter(layers.values())).scale_out.device
        self._host = self._host_memory()
        self.partitions = [
            WordPartition(layer.out_features * words_per_row(layer.in_features), communicator.world_size)
            for layer in layers.values()
        ]
        for matrix, (name, layer) in enumerate(layers.items()):
            layer.signal_sink = self
            partition = self.partitions[matrix]
            for planes in plane_sets(config.planes, layer.num_planes):
                shared = config.planes in ("levels", "alternating")
                full_name = name if shared else f"{name}.plane_{planes[0]}"
                if self._host is None:
                    accumulator = self.format.zeros(partition.elements_per_rank, device)
                else:
                    entries = partition.elements_per_rank // self.format.per_entry
                    accumulator = self._host.zeros(entries, self.format.dtype)
                self.accumulated.append(
                    Accumulated(
                        full_name,
                        len(self.accumulated),
                        layer,
                        matrix,
                        planes,
                        Segments(layer.out_features, layer.in_features, partition),
                        communicator.rank,
                        self.format,
                        accumulator,
                        config.step_size,
                    )
                )
        if not self.accumulated:
            raise UserError(f"boolean.planes = {config.planes}: no layer has such a plane; they are counted from 0")
        self._matrix_of = {id(layer): matrix for matrix, layer in enumerate(layers.values())}
        self._of_layer = {
            id(layer): [entry for entry in self.accumulated if entry.layer is layer] for layer in layers.values()
        }
        shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
        self.curvature = Curvature(shapes, config.curvature_decay, device)
        self.store: PlaneStore | None = None  # set once the engine has placed the planes

    def _host_memory(self) -> HostMemory | None:
        """Where accumulators are kept, if not on the device."""
        return HostMemory(self.device) if self.config.offload_accumulators else None

    def _on_device(self, entry: Accumulated) -> torch.Tensor:
        return entry.accumulator if self._host is None else self._host.on_device(entry.accumulator)

    def _settle(self) -> None:
        """Before accumulators are read or written where they are kept."""
        if self._host is not None:
            self._host.settle()

    def _trains(self, matrix: int) -> bool:
        """Whether it is the matrix's turn in this step."""
        return matrix % self.config.turns == self.step_count % self.config.turns

    def _training(self) -> list[Accumulated]:
        return [entry for entry in self.accumulated if self._trains(entry.matrix)]

    def _trained_plane(self, entry: Accumulated) -> int:
        """The plane whose scales give the signal its unit: the one that flips; the last for moves between levels."""
        if self.config.planes == "alternating":
            turn = self.step_count // self.config.alternate_every
            return entry.planes[-1 - turn % len(entry.planes)]
        return entry.planes[-1]

    def _planes_that_flip(self, entry: Accumulated) -> list[int]:
        return entry.planes if self.config.planes == "levels" else [self._trained_plane(entry)]

    # Phase 1: the signal sink of the layers.

    def signals(self, layer: MultiBooleanLinear) -> list[Signal]:
        if self.config.step_size == 0 or (self.config.signal != "raw" and self.curvature.steps == 0):
            return []  # the first step only measures curvature
        if not self._trains(self._matrix_of[id(layer)]):
            return []
        return [self._signal(entry) for entry in self._of_layer[id(layer)]]

    def _signal(self, entry: Accumulated) -> Signal:
        layer = entry.layer
        plane = self._trained_plane(entry)
        scale_out, scale_in = layer.scale_out.detach()[plane], layer.scale_in.detach()[plane]
        if self.config.planes == "levels" or self.probing:
            entry.scales = (layer.scale_out.detach().clone(), layer.scale_in.detach().clone())
        if self.config.planes == "levels":
            scale_out, scale_in = scale_out.abs(), scale_in.abs()
        row, column = self.curvature.factors(entry.matrix, scale_out, scale_in, self.config.signal)
        sizes = None
        if self.reduction.codec.splits_columns and self.magnitudes == "rank1" and self.curvature.steps:
            sizes = self.curvature.column_sizes(entry.matrix)
        columns = SplitColumns.of(column, sizes)
        entry.columns = columns.owners
        return self.reduction.wanted(entry.segments, row * (self._eta(entry) / self.gradient_scale), columns.sent)

    def _eta(self, entry: Accumulated) -> float:
        """Of this step: what a signal of 1 adds to an accumulator."""
        eta = entry.step_size / self._integration().divisor
        if self.config.signal in ("evidence", "rms"):  # in standard deviations: of what arrives
            eta /= self.reduction.codec.deviation
        return eta

    def take(self, layer, signals, row_squares, column_squares, tokens) -> None:
        entries = self._of_layer[id(layer)]
        matrix = self._matrix_of[id(layer)]
        self.curvature.add(matrix, row_squares, column_squares, tokens)
        if self._first_order is not None:
            self._first_order.append(matrix)
        sender = self.micro_batch * self.communicator.world_size + self.communicator.rank
        for entry, signal in zip(entries, signals, strict=bool(signals)):
            if entry.columns is None:
                raise RuntimeError("a signal is taken that was not asked for")
            key = self._key(_CODEC + sender, entry)
            if self._host is not None:
                self._host.fetch(entry.accumulator)  # it is there when the signal is
            self.reduction.send(entry, signal, entry.segments, entry.columns, key)

    # Phase 2, the owner's side.

    def _accumulate(self, entry: Accumulated, signals: Iterable[torch.Tensor]) -> None:
        """``signals``: the contributions to one micro-batch, each (32 P,)."""
        first = self.micro_batch * self.reduction.contributions
        accumulator = self._on_device(entry)
        for contribution, signal in enumerate(signals, first):
            if self.probing:
                entry.probe = signal + (0 if entry.probe is None else entry.probe)
            accumulate_signal(
                accumulator,
                signal[None],
                entry.beta_q15 if contribution == 0 else FIXED_ONE,
                self._integration().limit,
                [self._key(contribution, entry)],
                entry.first_element,
                self.format,
            )
        if self._host is not None:
            self._host.put_back(entry.accumulator, accumulator)

    def _key(self, contribution: int, entry: Accumulated) -> int:
        return fold_key(self.seed, self.step_count, contribution, entry.number)

    def finish_micro_batch(self) -> None:
        """Wait for the signals still on the wire. To be called after every backward pass."""
        self.reduction.finish()
        self.micro_batch += 1
        if self._first_order is not None:  # messages carry no names: a bucket holds what its place in the order says
            order = hashlib.sha256(str(self._first_order).encode()).hexdigest()[:16]
            agree(self.communicator, {"the digest of the order in which backward passes go through the layers": order})
            self._first_order = None

    # Phases 3 and 4.

    def all_finite(self, loss: torch.Tensor) -> bool:
        """Reduce the step's statistics over ranks; False, on every rank, if a loss or a signal was not finite."""
        self.curvature.sums[-1] = loss.detach().double()
        self.communicator.all_reduce_sum(self.curvature.sums, "statistics")
        return bool(torch.isfinite(self.curvature.sums).all())

    def skip(self) -> None:
        """End a step that flips nothing. What was not finite has counted as 0; accumulators keep what else its
        micro-batches added (bounded by ``max_step``), and its decay."""
        self.curvature.discard()
        for entry in self._training():
            entry.beta_q15 = FIXED_ONE  # its decay has been applied
            entry.probe = None
        self._next_step()

    def _next_step(self) -> None:
        self.step_count += 1
        self.micro_batch = 0
        if self.config.planes == "alternating" and self.step_count % self.config.alternate_every == 0:
            self._settle()
            for entry in self.accumulated:  # the turn of another plane
                entry.accumulator.zero_()
                entry.recent.clear()

    def step(self) -> FlipReport:
        """Decide and apply the flips of this step. ``all_finite`` comes first."""
        cap_rate = self.config.max_flip_rate * warmup_cosine(
            self.step_count, self.total_steps, self.config.warmup_fraction
        )
        report = FlipReport(cap_rate=cap_rate)
        if self.config.step_size > 0 and (self.config.signal == "raw" or self.curvature.steps > 0):
            self._flip(cap_rate, report)
        for entry in self.accumulated:
            entry.probe = None
        tokens = self.curvature.tokens * self.communicator.world_size
        self.curvature.absorb(tokens, self.gradient_scale)
        self._next_step()
        return report

    def _flip(self, cap_rate: float, report: FlipReport) -> None:
        training = self._training()
        if not training:  # fewer matrices than turns
            return
        report.accumulators = sum(entry.layer.num_weights for entry in training)
        candidates = [self._candidates(entry) for entry in training]
        caps = [int(cap_rate * entry.layer.num_weights) for entry in training]
        chosen = self._within_caps(training, candidates, caps)
        self._settle()
        masks: dict[tuple[int, int], torch.Tensor] = {}
        counts = torch.zeros(len(candidates), 3, dtype=torch.int64)  # candidates, flips, flipped back
        for i, (entry, found, moves) in enumerate(zip(training, candidates, chosen, strict=True)):
            for k in self._planes_that_flip(entry):
                flips = moves.elements[(moves.flipped >> k) & 1 == 1]
                masks[entry.matrix, k] = flip_mask(flips, entry.partition.words_per_rank)
            counts[i] = torch.tensor([len(found.elements), len(moves.elements), entry.flipped_back(moves.elements)])
            # Behind zero by the guard: flipping back takes more evidence than flipping did.
            reset = moves.values.sign() * (self.config.guard * self.format.threshold)
            kept_on = entry.accumulator.device
            set_accumulated(entry.accumulator, moves.elements.to(kept_on), reset.to(kept_on))
        self.store.apply(masks)
        if self.probing:
            self._predict(training, chosen, report)
        totals = self.communicator.all_reduce_sum(counts.to(self.device), "flip_counts").tolist()
        for entry, cap, (found, flips, back) in zip(training, caps, totals, strict=True):
            if self.config.adapt_step_size and cap > 0:
                entry.step_size = adapted(entry.step_size, found / cap, self.config.step_size)
            entry.beta_q15 = round(self._integration().decay * (1 - flips / entry.layer.num_weights) * FIXED_ONE)
            report.candidates[entry.name], report.flips[entry.name], report.flipped_back[entry.name] = (
                found,
                flips,
                back,
            )

    def _integration(self) -> Integration:
        turn = self.step_count % self.config.alternate_every + 1
        contributions = self.micro_batches * self.reduction.contributions
        steps = -(-self.curvature.steps // self.config.turns)  # in which a matrix whose turn it is has trained
        return integration(self.config, steps, turn, contributions)

    def _predict(self, training: list[Accumulated], chosen: list[Candidates], report: FlipReport) -> None:
        changes = [
            predicted_change(
                entry, moves, self._trained_plane(entry), self._eta(entry), self.curvature, self.config.signal
            )
            for entry, moves in zip(training, chosen, strict=True)
        ]
        totals = self.communicator.all_reduce_sum(torch.stack(changes), "flip_counts").tolist()
        report.predicted = {entry.name: total for entry, total in zip(training, totals, strict=True)}

    def _candidates(self, entry: Accumulated) -> Candidates:
        if self.config.planes != "levels":
            plane = self._trained_plane(entry)
            words = self.store.owned_words(entry.matrix, plane)
            return bit_moves(*find_candidates(self._on_device(entry), words, self.format), plane)
        elements, values = find_candidates(self._on_device(entry), None, self.format)
        if entry.scales is None:
            raise RuntimeError("flips are decided after a backward pass")
        words = [self.store.owned_words(entry.matrix, k) for k in entry.planes]
        row_elements = words_per_row(entry.layer.in_features) * WORD_BITS
        return level_moves(elements, values, words, *entry.scales, entry.first_element, row_elements)

    def _within_caps(
        self, training: list[Accumulated], candidates: list[Candidates], caps: list[int]
    ) -> list[Candidates]:
        """Of this rank's candidates those that the caps let flip."""

        def tickets(number: int, players: Candidates) -> torch.Tensor:
            entry = training[number]
            return draw_tickets(self._key(_LOTTERY, entry), players.elements.long() + entry.first_element)

        return within_caps(
            candidates, caps, tickets, lambda counts: self.communicator.all_reduce_sum(counts, "flip_counts")
        )

    # State.

    @property
    def num_trained_weights(self) -> int:
        return sum(layer.num_weights for layer in self.layers.values())

    @property
    def plane_names(self) -> list[str]:
        """Every plane, in the order of the plane store."""
        return [plane_name(name, k) for name, layer in self.layers.items() for k in range(layer.num_planes)]

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps, by category."""
        kept = [tensor for entry in self.accumulated for tensor in (*entry.recent, *(entry.scales or ()))]
        kept += [entry.columns for entry in self.accumulated if entry.columns is not None]
        return {
            "accumulators": sum(entry.accumulator.nbytes for entry in self.accumulated),
            "curvature": self.curvature.smoothed.nbytes + self.curvature.sums.nbytes,
            "flip_bookkeeping": sum(tensor.nbytes for tensor in kept),
        }

    def accumulator_quantiles(self) -> dict[str, list[float]]:
        """{accumulator: [quantiles of |v| in thresholds.., share at the bound]} of all ranks' parts; all ranks call."""
        counts = torch.stack([histogram(entry, self._on_device(entry)) for entry in self.accumulated])
        counts = self.communicator.all_reduce_sum(counts, "accumulator_quantiles").cpu()
        return {entry.name: quantiles(of_entry) for entry, of_entry in zip(self.accumulated, counts, strict=True)}

    def state_pieces(self) -> list[Piece]:
        """What this rank alone has: its parts of accumulators and planes, in coordinates of the whole matrices."""
        self._settle()
        pieces = [piece for entry in self.accumulated for piece in entry.state_pieces()]
        names, rank = list(self.layers), self.communicator.rank
        for entry in self.accumulated:
            for k in entry.planes:
                words = self.store.owned_words(entry.matrix, k)[: entry.partition.words_owned(rank)]
                name = plane_name(names[entry.matrix], k)
                pieces.append(Piece(f"plane/{name}", entry.partition.first_word(rank), words))
        if rank == 0:
            pieces.append(Piece("curvature", 0, self.curvature.smoothed))
        return pieces

    def shared_state(self) -> dict:
        """What all ranks have alike, as JSON."""
        return {
            "step": self.step_count,
            "curvature_steps": self.curvature.steps,
            "tokens": self.curvature.smoothed_tokens,
            "accumulators": {entry.name: entry.shared_state() for entry in self.accumulated},
        }

    def load_state(self, shared: dict, saved: Checkpoint) -> None:
        """Restore what ``shared_state`` and ``state_pieces`` of any number of ranks gave, but for the planes, which the
        model has by now. Raises UserError where it is of another run."""
        mine, theirs = {entry.name for entry in self.accumulated}, set(shared["accumulators"])
        if mine != theirs:
            raise UserError(f"{saved.folder} is of other layers or planes: {', '.join(sorted(mine ^ theirs)[:3])} ...")
        for entry in self.accumulated:
            entry.load_state(shared["accumulators"][entry.name], saved)
        self.curvature.smoothed.copy_(saved.whole("curvature", self.curvature.smoothed))
        self.curvature.steps = shared["curvature_steps"]
        self.curvature.smoothed_tokens = shared["tokens"]
        self.step_count = shared["step"]

"""What a step did, what its signal said of that, how full the accumulators are: for the logs, no part of the rule."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mbdist.config.optimizers import SignalRule
from mbdist.optim.accumulated import Accumulated
from mbdist.optim.curvature import Curvature
from mbdist.optim.moves import Candidates
from mbdist_kernels import WORD_BITS, accumulated_values, words_per_row

_BINS = 128  # of |v|, a threshold


@dataclass
class FlipReport:
    """What a step did, by name of the accumulator; counts are sums over ranks."""

    flips: dict[str, int] = field(default_factory=dict)  # weights that moved
    flipped_back: dict[str, int] = field(default_factory=dict)  # of them, those that had moved in the last 16 steps
    candidates: dict[str, int] = field(default_factory=dict)  # weights whose accumulator had reached the threshold
    predicted: dict[str, float] = field(default_factory=dict)  # of a probed step: second-order change of the loss
    cap_rate: float = 0.0
    accumulators: int = 0  # those that had their turn, one for every bit, or move between levels, that may flip

    def total(self) -> int:
        return sum(self.flips.values())

    @property
    def flip_rate(self) -> float:
        """Share of what might have flipped."""
        return self.total() / self.accumulators if self.accumulators else 0.0


def predicted_change(
    entry: Accumulated,
    moves: Candidates,  # of this rank
    plane: int,  # whose scales gave the signal its unit
    eta: float,  # what a signal of 1 added to the accumulator
    curvature: Curvature,
    rule: SignalRule,
) -> torch.Tensor:
    """What a probed step's signal says of its moves, () fp64: a move by u (in units of 2 |s|) changes the loss by
    2 q u + 2 s^2 h u^2, q = G s. Interactions between moves are what it leaves out."""
    if entry.probe is None or not len(moves.elements):
        return torch.zeros((), dtype=torch.float64, device=moves.elements.device)
    assert entry.scales is not None, "kept while steps are probed"
    rows, columns = curvature.cost_of_a_flip(entry.matrix, *(scale[plane] for scale in entry.scales))
    width = words_per_row(entry.layer.in_features) * WORD_BITS
    positions = moves.elements.long()
    signal = entry.probe[positions] / eta
    positions = positions + entry.first_element
    cost = rows[positions // width] * columns[positions % width]
    q = signal * curvature.unit(cost, rule)
    return (2 * q * moves.steps + 2 * cost * moves.steps.square()).double().sum()


def histogram(entry: Accumulated, accumulator: torch.Tensor) -> torch.Tensor:
    """Counts of |v| over this rank's part, (2 _BINS + 1,) int64: by bins, the last of which holds all from two
    thresholds on; then those at the bound. What pads rows to whole words counts as 0 here. ``accumulator``: the
    entry's, on the device."""
    size = accumulated_values(accumulator[: entry.entries_owned]).float().abs()
    bins = (size * (_BINS / entry.format.threshold)).long().clamp_max(2 * _BINS - 1)
    counts = torch.bincount(bins, minlength=2 * _BINS + 1)
    counts[-1] = (size >= entry.format.bound).sum()
    return counts


def quantiles(counts: torch.Tensor, of: tuple[float, ...] = (0.5, 0.9, 0.99)) -> list[float]:
    """[quantiles of |v| in thresholds.., share at the bound] of a ``histogram``, or of a sum of some."""
    shares = counts.double() / counts[:-1].sum()
    below = shares[:-1].cumsum(0)
    return [*((below < q).sum().item() / _BINS for q in of), shares[-1].item()]

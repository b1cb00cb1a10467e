"""Where to cut the candidates of a matrix so that at most ``cap`` bits flip: exact, and the same on every rank.

Candidates have ranks from 64 to 127. The cut is the lowest rank that the cap admits whole; if the
rank below it would overshoot, a lottery among its candidates (tickets drawn by counter-based random bits) fills up
what is left. Everything is integer counts summed over ranks, so all ranks compute the same cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mbdist.optim.moves import Candidates
from mbdist_kernels import LOTTERY_TICKETS, THRESHOLD, TOP_RANK


@dataclass(frozen=True)
class Cut:
    """Ranks >= ``rank`` flip, and of rank - 1 the candidates with a ticket below ``tickets``."""

    rank: int
    tickets: int
    flips: int


def cut_by_rank(
    histogram: torch.Tensor,  # (64,) int64, counts of the ranks 64 .. 127 over all workers
    cap: int,
) -> tuple[Cut, bool]:
    """The cut at whole ranks, and whether a lottery at the rank below could still add flips."""
    from_top = histogram.flip(0).cumsum(0)  # flips if the cut is at 127, 126, ...
    admitted = int((from_top <= cap).sum())
    flips = int(from_top[admitted - 1]) if admitted else 0
    return Cut(TOP_RANK + 1 - admitted, 0, flips), admitted < len(histogram) and flips < cap


def add_lottery(cut: Cut, ticket_counts: torch.Tensor, cap: int) -> Cut:
    """Let as many tickets of the next rank win as the cap still admits."""
    running = ticket_counts.cumsum(0)
    tickets = int((running <= cap - cut.flips).sum())
    return Cut(cut.rank, tickets, cut.flips + (int(running[tickets - 1]) if tickets else 0))


def within_caps(
    candidates: list[Candidates],  # this worker's, of every accumulator
    caps: list[int],  # over all workers
    tickets: Callable[[int, Candidates], torch.Tensor],  # of the lottery: for players of an accumulator, by its number
    sum_over_workers: Callable[[torch.Tensor], torch.Tensor],
) -> list[Candidates]:
    """This worker's candidates that flip: the highest ranks, and winners of a lottery below them."""
    bins = TOP_RANK + 1 - THRESHOLD
    counts = [torch.bincount(found.ranks.long() - THRESHOLD, minlength=bins) for found in candidates]
    histograms = sum_over_workers(torch.stack(counts)).cpu()
    cuts = [cut_by_rank(histogram, cap) for histogram, cap in zip(histograms, caps, strict=True)]
    chosen = [found.only(found.ranks >= cut.rank) for found, (cut, _) in zip(candidates, cuts, strict=True)]
    undecided = [i for i, (_, lottery) in enumerate(cuts) if lottery]
    if undecided:
        players = [candidates[i].only(candidates[i].ranks == cuts[i][0].rank - 1) for i in undecided]
        drawn = [tickets(i, of_players) for i, of_players in zip(undecided, players, strict=True)]
        counts = [torch.bincount(of_players, minlength=LOTTERY_TICKETS) for of_players in drawn]
        totals = sum_over_workers(torch.stack(counts)).cpu()
        for i, of_players, numbers, total in zip(undecided, players, drawn, totals, strict=True):
            cut = add_lottery(cuts[i][0], total, caps[i])
            chosen[i] = chosen[i] + of_players.only(numbers < cut.tickets)
    return chosen

"""Perplexity over windows: exp of the mean negative log-likelihood of tokens 2 .. window of every window."""

from __future__ import annotations

import math
from collections.abc import Callable

import datasets
import torch

from mbdist.comm.communicator import Communicator
from mbdist.data.batches import fetch


@torch.no_grad()
def perplexity(
    logits_of: Callable[[torch.Tensor], torch.Tensor],  # (batch, window) int64 -> (batch, window, V)
    windows: datasets.Dataset,
    batch_size: int,
    communicator: Communicator,
    device: torch.device,
) -> float:
    """Over the learned tokens of all windows. Ranks take turns; all of them make the same number of forward passes,
    because a gather of partitioned weights needs everyone."""
    ranks = communicator.world_size
    mine = list(range(communicator.rank, len(windows), ranks))
    passes = math.ceil(math.ceil(len(windows) / ranks) / batch_size)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # nll, tokens
    for i in range(passes):
        numbers = mine[i * batch_size : (i + 1) * batch_size]
        batch = fetch(windows, numbers or [0])
        logits = logits_of(batch.input_ids.to(device))
        if numbers:
            nll, count = _negative_log_likelihood(logits, batch.input_ids.to(device), batch.learned.to(device))
            totals += torch.stack((nll, count))
    nll, tokens = communicator.all_reduce_sum(totals, "evaluation").tolist()
    return math.exp(min(nll / tokens, 700.0)) if tokens else math.nan


def _negative_log_likelihood(
    logits: torch.Tensor, input_ids: torch.Tensor, learned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed nll, number of targets), fp64, one sequence at a time: fp32 logits of a batch would not stay in cache."""
    nll = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, ids, is_target in zip(logits, input_ids, learned[:, 1:], strict=True):
        token_nll = torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
        nll += token_nll[is_target].double().sum()
    return nll, learned[:, 1:].sum().double()

"""What an evaluation measures over windows: perplexity and, against a teacher, KL and agreement of the top-1 token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import torch
from torch import nn
from torch.nn import functional

from mbdist.comm.communicator import Communicator
from mbdist.data.batches import fetch

_CHUNK_BYTES = 8 << 20  # of fp32 logits worked on at a time

LogitsOf = Callable[[torch.Tensor], torch.Tensor]  # (batch, window) int64 -> (batch, window, V)


def logits_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> LogitsOf:
    """The model's logits, computed in ``dtype``."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(input_ids=ids, use_cache=False).logits

    return forward


@dataclass(frozen=True)
class Evaluation:
    """Means over the learned tokens 2 .. window of every window."""

    perplexity: float  # exp of the mean negative log-likelihood
    kl: float | None = None  # KL(teacher || model), nats a token
    top1_agreement: float | None = None  # share of tokens where both rank the same token first


@torch.no_grad()
def evaluate(
    student: LogitsOf,
    windows: datasets.Dataset,
    batch_size: int,
    communicator: Communicator,
    device: torch.device,
    teacher: LogitsOf | None = None,
    between: Callable[[], None] = lambda: None,  # called before every batch, by all ranks
) -> Evaluation:
    """Ranks take turns; all of them make the same number of forward passes, because a gather of partitioned weights
    needs everyone."""
    ranks = communicator.world_size
    mine = list(range(communicator.rank, len(windows), ranks))
    passes = math.ceil(math.ceil(len(windows) / ranks) / batch_size)
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # targets, nll, kl, agreements
    for i in range(passes):
        between()
        numbers = mine[i * batch_size : (i + 1) * batch_size]
        batch = fetch(windows, numbers or [0])
        ids, learned = batch.input_ids.to(device), batch.learned.to(device)
        logits = student(ids)
        taught = teacher(ids) if teacher is not None else None
        if numbers:
            totals += _sums(logits, taught, ids, learned)
    targets, nll, kl, agreed = communicator.all_reduce_sum(totals, "evaluation").tolist()
    if not targets:
        return Evaluation(math.nan)
    perplexity = math.exp(min(nll / targets, 700.0))
    return Evaluation(perplexity) if teacher is None else Evaluation(perplexity, kl / targets, agreed / targets)


def _sums(
    logits: torch.Tensor,  # (batch, window, V)
    taught: torch.Tensor | None,  # (batch, window, V)
    input_ids: torch.Tensor,
    learned: torch.Tensor,
) -> torch.Tensor:
    """(targets, nll, kl, agreements), fp64, a few tokens at a time: fp32 logits of more would not stay in cache."""
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    for sequence, is_target in enumerate(learned[:, 1:]):
        positions = is_target.nonzero()[:, 0]
        targets = input_ids[sequence, 1:][positions]
        sums[0] += len(positions)
        for chunk in torch.arange(len(positions), device=positions.device).split(rows):
            at = positions[chunk]
            log_p = logits[sequence, at].float().log_softmax(-1)
            sums[1] -= log_p.gather(-1, targets[chunk, None]).double().sum()
            if taught is not None:
                log_q = taught[sequence, at].float().log_softmax(-1)
                sums[2] += functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).double().sum()
                sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return sums

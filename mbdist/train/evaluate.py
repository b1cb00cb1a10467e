"""What an evaluation measures over windows: perplexity and, against a teacher, KL and agreement of the top-1 token."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import torch
from torch.nn import functional

from mbdist.comm.communicator import Communicator
from mbdist.data.batches import Batch, fetch
from mbdist.loss import Lesson
from mbdist.model.readout import Head, Reader, blocks, target_rows


@dataclass(frozen=True)
class Evaluation:
    """Means over the learned tokens 2 .. window of every window."""

    perplexity: float  # exp of the mean negative log-likelihood
    kl: float | None = None  # KL(teacher || model), nats a token
    top1_agreement: float | None = None  # share of tokens where both rank the same token first


@torch.no_grad()
def evaluate(
    student: Reader,
    windows: datasets.Dataset,
    batch_size: int,
    communicator: Communicator,
    device: torch.device,
    teacher: Callable[[Batch], Lesson] | None = None,
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
        batch = fetch(windows, numbers or [0]).to(device)
        lesson = teacher(batch) if teacher is not None else None
        sums = student(batch.input_ids, functools.partial(_sums, lesson=lesson, batch=batch))
        if numbers:
            totals += sums
    targets, nll, kl, agreed = communicator.all_reduce_sum(totals, "evaluation").tolist()
    if not targets:
        return Evaluation(math.nan)
    perplexity = math.exp(min(nll / targets, 700.0))
    return Evaluation(perplexity) if teacher is None else Evaluation(perplexity, kl / targets, agreed / targets)


def _sums(
    states: torch.Tensor,  # (batch, window, d)
    head: Head,
    lesson: Lesson | None,
    batch: Batch,
) -> torch.Tensor:
    """(targets, nll, kl, agreements), fp64; logits of some tokens at a time."""
    sums = torch.zeros(4, dtype=torch.float64, device=states.device)
    is_target = batch.learned[:, 1:].reshape(-1)
    targets = batch.input_ids[:, 1:].reshape(-1)[is_target, None]
    rows = target_rows(states, is_target)
    sums[0] = len(rows)
    with contextlib.nullcontext() if lesson is None else lesson.opened(is_target) as taught:
        for chunk in head.chunks(rows, None):
            logits = head.logits(rows[chunk])
            of_chunk = taught[chunk] if taught is not None else None
            for block in blocks(logits):
                log_p = logits[block].float().log_softmax(-1)
                sums[1] -= log_p.gather(-1, targets[chunk][block]).double().sum()
                if of_chunk is not None:
                    log_q = of_chunk[block].float().log_softmax(-1)
                    kl = functional.kl_div(log_p, log_q, reduction="none", log_target=True)
                    sums[2] += kl.sum(-1).double().sum()
                    sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return sums

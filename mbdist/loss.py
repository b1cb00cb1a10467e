"""Distillation loss: KL(teacher || student), cross-entropy, hidden-state terms (arXiv 2505.22811, section 4).

The token-wise terms and their gradient are computed together, head product included, a chunk of tokens at a time: of
student and teacher alike, logits exist for one chunk, in the compute dtype, and for a few rows of it in fp32. What is
kept for backward is the gradient of the states before the head, and of the head where it trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from mbdist.config.loss import LossConfig
from mbdist.model.readout import Head, Readout, blocks, target_rows


@dataclass
class LossTerms:
    """The share of a micro-batch in the loss of its global batch, and what the log shows."""

    total: torch.Tensor  # scalar, carries the gradient
    kl: float  # sum over the micro-batch's targets
    cross_entropy: float  # the same


@dataclass(frozen=True)
class TopTokens:
    """A teacher's distribution by its most likely tokens and one bucket for all others."""

    tokens: torch.Tensor  # (rows, k) int64
    log_q: torch.Tensor  # (rows, k) fp32
    log_rest: torch.Tensor  # (rows, 1) fp32: log of the probability of all others

    @classmethod
    def of(cls, log_q: torch.Tensor, top_k: int) -> TopTokens:
        """Of a whole distribution: (rows, V) fp32."""
        top, tokens = log_q.topk(min(top_k, log_q.shape[-1]))
        return cls(tokens, top, log_of_the_rest(top))

    def __getitem__(self, rows: slice) -> TopTokens:
        return TopTokens(self.tokens[rows], self.log_q[rows], self.log_rest[rows])


class Taught(Protocol):
    """What a teacher says about the targets of a micro-batch, in their order."""

    def __getitem__(self, rows: slice) -> torch.Tensor | TopTokens: ...  # logits (rows, V), or a summary of them


class Lesson(Protocol):
    """What a teacher says about a micro-batch."""

    hidden_states: tuple[torch.Tensor, ...] | None  # after every block: (batch, window, d)

    def opened(self, is_target: torch.Tensor) -> contextlib.AbstractContextManager[Taught]:
        """While it is open, logits can be computed. ``is_target`` as in ``target_rows``."""


def token_loss(
    states: torch.Tensor,  # (batch, window, d): the student's, before its head
    head: Head,
    lesson: Lesson | None,
    input_ids: torch.Tensor,  # (batch, window) int64
    learned: torch.Tensor,  # (batch, window) bool: which tokens are targets
    config: LossConfig,
    num_targets: int,  # of the whole global batch
    num_sequences: int,  # of the whole global batch
) -> torch.Tensor:
    """(3,) fp64: the micro-batch's share in the loss of its global batch, which carries the gradient; and for the log
    the sums over its targets of KL and of cross-entropy.

    Sums are divided by the targets of the whole global batch (``batchmean``: that of the KL by its sequences), so
    accumulation and sharding do not change the weight of a token."""
    is_target = learned[:, 1:].reshape(-1)
    targets = input_ids[:, 1:].reshape(-1)[is_target]
    rows = target_rows(states, is_target)
    with contextlib.nullcontext() if lesson is None else lesson.opened(is_target) as taught:
        weights = _weights(config, num_targets / max(1, num_sequences))
        sums = _TokenLoss.apply(rows, head, taught, targets, config, weights, torch.is_grad_enabled(), *head.trained)
    return torch.cat([sums[:1] / max(1, num_targets), sums[1:].detach()])


def next_token_loss(
    readout: Readout,
    forward: Callable,  # of its model
    input_ids: torch.Tensor,  # (batch, window) int64
) -> torch.Tensor:
    """Mean cross-entropy over all tokens but the first ones; a scalar."""
    read = partial(
        token_loss,
        lesson=None,
        input_ids=input_ids,
        learned=torch.ones_like(input_ids, dtype=torch.bool),
        config=LossConfig(teacher="none"),
        num_targets=input_ids[:, 1:].numel(),
        num_sequences=len(input_ids),
    )
    return readout(forward, read, input_ids, use_cache=False)[1][0]


def hidden_loss(
    student_hidden: tuple[torch.Tensor, ...],  # after every block: (batch, window, d)
    teacher_hidden: tuple[torch.Tensor, ...],
    learned: torch.Tensor,  # (batch, window) bool
    config: LossConfig,
    num_targets: int,  # of the whole global batch
) -> torch.Tensor:
    """The hidden-state term: a sum over blocks of means over the global batch's targets."""
    is_target = learned[:, 1:].reshape(-1)
    total = sum(
        _hidden_term(target_rows(s, is_target).float(), target_rows(t, is_target).float(), config.hidden)
        for s, t in zip(student_hidden, teacher_hidden, strict=True)
    )
    return config.hidden_weight / max(1, num_targets) * total


class _TokenLoss(torch.autograd.Function):
    """(3,) fp64: the sum over rows of kl_weight * KL + ce_weight * cross-entropy, and both sums for the log."""

    @staticmethod
    def forward(ctx, rows, head: Head, taught: Taught | None, targets, config, weights, wants_gradient, *trained):
        sums = torch.zeros(2, dtype=torch.float64, device=rows.device)  # KL, cross-entropy
        kl_weight, ce_weight = weights
        gradients = [torch.empty_like(rows), *map(torch.zeros_like, trained)] if wants_gradient else []
        for chunk in head.chunks(rows, config.chunk_tokens):
            with torch.set_grad_enabled(wants_gradient):
                inputs = rows[chunk].detach().requires_grad_(wants_gradient)
                logits = head.logits(inputs)
            of_chunk = taught[chunk] if taught is not None else None
            slope = torch.empty_like(logits) if wants_gradient else None
            for block in blocks(logits):
                of_block = of_chunk[block] if of_chunk is not None else None
                kl, ce, wanted = _row_terms(logits.detach()[block], of_block, targets[chunk][block], config, weights)
                sums += torch.stack([kl, ce])
                if wants_gradient:
                    slope[block] = wanted
            if wants_gradient:
                found = torch.autograd.grad(logits, [inputs, *trained], slope)
                gradients[0][chunk] = found[0]
                for total, of_parameter in zip(gradients[1:], found[1:], strict=True):
                    total += of_parameter
            del logits, of_chunk, slope  # before the next chunk's are made
        ctx.save_for_backward(*gradients)
        return torch.cat([(kl_weight * sums[0] + ce_weight * sums[1])[None], sums])

    @staticmethod
    def backward(ctx, grad_sums):
        rows, *trained = (gradient * grad_sums[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return rows, None, None, None, None, None, None, *trained


def _weights(config: LossConfig, targets_per_sequence: float) -> tuple[float, float]:
    """(of the KL, of the cross-entropy) of a target."""
    positions = targets_per_sequence if config.kl_reduction == "batchmean" else 1.0
    return config.kl_weight * positions, config.cross_entropy_weight or float(config.teacher == "none")


def _row_terms(
    logits: torch.Tensor,  # (rows, V): the student's, of any float type
    taught: torch.Tensor | TopTokens | None,
    targets: torch.Tensor,  # (rows,) int64
    config: LossConfig,
    weights: tuple[float, float],  # of the KL, of the cross-entropy
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of KL, sum of cross-entropy, gradient of their weighted sum (rows, V) fp32)."""
    kl_weight, ce_weight = weights
    logits, temperature = logits.float(), config.temperature
    log_p = logits.log_softmax(-1)
    target = targets[:, None]
    ce = -log_p.gather(1, target).sum()
    kl = torch.zeros_like(ce)
    slope = torch.zeros_like(logits)
    if ce_weight:
        slope += ce_weight * log_p.exp()
        slope.scatter_add_(1, target, torch.full_like(target, -ce_weight, dtype=slope.dtype))
    if taught is not None:
        if temperature != 1.0:
            log_p = (logits / temperature).log_softmax(-1)
        if isinstance(taught, torch.Tensor):
            log_q = (taught.float() / temperature if temperature != 1.0 else taught.float()).log_softmax(-1)
            taught = log_q if config.top_k is None else TopTokens.of(log_q, config.top_k)
        kl, difference = _kl_to_top(log_p, taught) if isinstance(taught, TopTokens) else _kl(log_p, taught)
        # temperature^2 keeps the size of the gradient independent of the temperature (Hinton et al.)
        kl *= temperature**2
        slope.add_(difference, alpha=kl_weight * temperature)
    return kl, ce, slope


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over rows of KL(q || p), p - q); overwrites ``log_p``."""
    q = log_q.exp()
    kl = (q * (log_q - log_p)).sum()
    return kl, log_p.exp_().sub_(q)


def _kl_to_top(log_p: torch.Tensor, taught: TopTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over the top tokens and one bucket for all others, whose probability the teacher shares out as the
    student does (the shares are constants in the gradient)."""
    top_p = log_p.gather(-1, taught.tokens)
    q, rest_p = taught.log_q.exp(), log_of_the_rest(top_p)
    excess = taught.log_rest - rest_p
    kl = (q * (taught.log_q - top_p)).sum() + (taught.log_rest.exp() * excess).sum()
    difference = log_p.exp_().mul_(-torch.expm1(excess))
    return kl, difference.scatter_(-1, taught.tokens, top_p.exp() - q)


def log_of_the_rest(top: torch.Tensor) -> torch.Tensor:
    """log of what log-probabilities (rows, k) leave to all other tokens: (rows, 1)."""
    return torch.log1p(-top.logsumexp(-1, keepdim=True).exp().clamp_max(1 - 1e-7))


def _hidden_term(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Sum over rows of the mean squared difference (mse), or of || t/||t|| - s/||s|| ||^2 (normalised)."""
    if kind == "mse":
        return (student - teacher).square().mean(-1).sum()
    normalise = torch.nn.functional.normalize
    return (normalise(student, dim=-1) - normalise(teacher, dim=-1)).square().sum()

"""Distillation loss: KL(teacher || student), cross-entropy, hidden-state terms (arXiv 2505.22811, section 4).

A vocabulary has tens of thousands of entries, so [tokens, vocabulary] in fp32 is the largest tensor of a small model's
step. The token-wise terms and their gradient are computed together, a few rows at a time that stay in cache; only the
gradient, in the logits' own dtype, is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbdist.config.schema import LossConfig

_CHUNK_BYTES = 8 << 20  # fp32 rows of logits worked on at a time


@dataclass
class LossTerms:
    """The share of a micro-batch in the loss of its global batch, and what the log shows."""

    total: torch.Tensor  # scalar, carries the gradient
    kl: float  # sum over the micro-batch's targets
    cross_entropy: float  # the same


class _TokenLoss(torch.autograd.Function):
    """sum over rows of kl_weight * KL + ce_weight * cross-entropy, and both sums for the log."""

    @staticmethod
    def forward(ctx, student, teacher, targets, temperature, kl_weight, ce_weight, top_k):
        grad = torch.empty_like(student)
        kl_sum = torch.zeros((), dtype=torch.float64, device=student.device)
        ce_sum = torch.zeros_like(kl_sum)
        rows = max(1, _CHUNK_BYTES // (4 * student.shape[1]))
        for first in range(0, student.shape[0], rows):
            chunk = slice(first, first + rows)
            logits = student[chunk].float()
            log_p = logits.log_softmax(-1)
            target = targets[chunk, None]
            ce_sum -= log_p.gather(1, target).sum()
            slope = torch.zeros_like(logits)
            if ce_weight:
                slope += ce_weight * log_p.exp()
                slope.scatter_add_(1, target, torch.full_like(target, -ce_weight, dtype=slope.dtype))
            if teacher is not None:
                if temperature != 1.0:
                    log_p = (logits / temperature).log_softmax(-1)
                taught = teacher[chunk].float()
                log_q = (taught / temperature if temperature != 1.0 else taught).log_softmax(-1)
                if top_k is not None:
                    log_q = _tail_like_student(log_q, log_p, top_k)
                q = log_q.exp()
                # temperature^2 keeps the size of the gradient independent of the temperature (Hinton et al.)
                kl_sum += temperature**2 * (q * (log_q - log_p)).sum()
                slope.add_(log_p.exp_().sub_(q), alpha=kl_weight * temperature)
            grad[chunk] = slope
        ctx.save_for_backward(grad)
        return kl_weight * kl_sum + ce_weight * ce_sum, kl_sum, ce_sum

    @staticmethod
    def backward(ctx, grad_total, _kl, _ce):
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None, None, None, None


def _tail_like_student(
    log_q: torch.Tensor,  # (rows, V): the teacher's
    log_p: torch.Tensor,  # (rows, V): the student's
    top_k: int,
) -> torch.Tensor:
    """The teacher's distribution with everything below its ``top_k`` tokens shared out as the student does: KL to it is
    KL over top_k tokens and one bucket for the rest, and so is its gradient (the shares are constants in it)."""
    top, where = log_q.topk(min(top_k, log_q.shape[-1]))
    rest_q = torch.log1p(-top.logsumexp(-1, keepdim=True).exp().clamp_max(1 - 1e-7))
    rest_p = torch.log1p(-log_p.gather(-1, where).logsumexp(-1, keepdim=True).exp().clamp_max(1 - 1e-7))
    return (log_p + (rest_q - rest_p)).scatter(-1, where, top)


def distillation_loss(
    student_logits: torch.Tensor,  # (batch, window, V)
    teacher_logits: torch.Tensor | None,  # (batch, window, V)
    input_ids: torch.Tensor,  # (batch, window) int64
    learned: torch.Tensor,  # (batch, window) bool: which tokens are targets
    config: LossConfig,
    num_targets: int,  # of the whole global batch
    num_sequences: int,  # of the whole global batch
    student_hidden: tuple[torch.Tensor, ...] | None = None,  # after every block: (batch, window, d)
    teacher_hidden: tuple[torch.Tensor, ...] | None = None,
) -> LossTerms:
    """Position t predicts token t + 1. Sums are divided by the targets of the whole global batch (``batchmean``: by its
    sequences, the hidden-state term not), so accumulation and sharding do not change the weight of a token."""
    is_target = learned[:, 1:].reshape(-1)
    targets = input_ids[:, 1:].reshape(-1)[is_target]
    ce_weight = config.cross_entropy_weight or float(config.teacher == "none")
    total, kl, ce = _TokenLoss.apply(
        _rows(student_logits, is_target),
        None if teacher_logits is None else _rows(teacher_logits, is_target),
        targets,
        config.temperature,
        config.kl_weight,
        ce_weight,
        config.top_k,
    )
    total = total / max(1, num_sequences if config.kl_reduction == "batchmean" else num_targets)
    if config.hidden != "none":
        total = total + config.hidden_weight / max(1, num_targets) * sum(
            _hidden_term(_rows(s, is_target).float(), _rows(t, is_target).float(), config.hidden)
            for s, t in zip(student_hidden, teacher_hidden, strict=True)
        )
    return LossTerms(total, kl.item(), ce.item())


def _rows(states: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """The positions that predict a target, flat: (T, ...)."""
    flat = states[:, :-1].reshape(-1, states.shape[-1])
    return flat if bool(is_target.all()) else flat[is_target]


def _hidden_term(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Sum over rows of the mean squared difference (mse), or of || t/||t|| - s/||s|| ||^2 (normalised)."""
    if kind == "mse":
        return (student - teacher).square().mean(-1).sum()
    normalise = torch.nn.functional.normalize
    return (normalise(student, dim=-1) - normalise(teacher, dim=-1)).square().sum()

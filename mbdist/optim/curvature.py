"""Factored curvature of every trained matrix, and the vectors that turn a weight gradient into the signal.

h_ij = (sum_t dY_ti^2) (sum_t X_tj^2), the factored diagonal of the Gauss-Newton matrix for a loss averaged over
tokens: m + n floats a matrix. A flip of bit ij changes the loss by -2 B q + 2 s^2 h to second order (s = s_out_i
s_in_j), so it pays where B q / (s^2 h) > 1. Both q and s^2 h are rank-1 scalings of G, so the whole normalisation is
two vectors.
"""

from __future__ import annotations

import torch

from mbdist.config.optimizers import SignalRule

_FLOOR = 1e-3  # of the mean: rows without gradient and scales near 0 must not blow the ratio up


def _sign(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 0, -1.0, 1.0)


def _floored(values: torch.Tensor) -> torch.Tensor:
    magnitude = values.abs()
    return _sign(values) * magnitude.clamp_min(_FLOOR * magnitude.mean() + 1e-30)


class Curvature:
    """Sums over the tokens of a step, smoothed over steps. All matrices share one flat fp64 vector, one all-reduce."""

    def __init__(self, shapes: list[tuple[int, int]], decay: float, device: torch.device):
        self.shapes = shapes  # (m, n) of every matrix
        self.decay = decay
        self.steps = 0
        lengths = [length for shape in shapes for length in shape]
        # One extra element carries the loss, so that a loss that is not finite on one rank is seen by all.
        self.sums = torch.zeros(sum(lengths) + 1, dtype=torch.float64, device=device)
        self._sum_views = self.sums[:-1].split(lengths)
        self.smoothed = torch.zeros(sum(lengths), dtype=torch.float32, device=device)
        self._smoothed_views = self.smoothed.split(lengths)
        self.tokens = 0
        self.smoothed_tokens = 0.0  # T of a step

    def add(self, index: int, row_squares: torch.Tensor, column_squares: torch.Tensor, tokens: int) -> None:
        """Add one backward pass of one matrix."""
        self._sum_views[2 * index].add_(row_squares)
        self._sum_views[2 * index + 1].add_(column_squares)
        if index == 0:
            self.tokens += tokens

    def discard(self) -> None:
        """Forget the sums of a step that is skipped."""
        self.sums.zero_()
        self.tokens = 0

    def absorb(self, tokens: int, gradient_scale: float) -> None:
        """Fold the step's reduced sums into the smoothed estimate. ``gradient_scale``: factor the gradients carried."""
        weight = 1.0 - self.decay if self.steps else 1.0
        for i, (sums, smoothed) in enumerate(zip(self._sum_views, self._smoothed_views, strict=True)):
            mean = sums * (tokens / gradient_scale**2) if i % 2 == 0 else sums / tokens
            smoothed.lerp_(mean.float(), weight)
        self.smoothed_tokens += weight * (tokens - self.smoothed_tokens)
        self.steps += 1
        self.discard()

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(r (m,), c (n,)) with h = outer(r, c), as smoothed so far."""
        return self._smoothed_views[2 * index], self._smoothed_views[2 * index + 1]

    def factors(
        self,
        index: int,
        scale_out: torch.Tensor,  # (m,) of the plane that gives the unit
        scale_in: torch.Tensor,  # (n,)
        signal: SignalRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(row_factor (m,), column_factor (n,)) with G * outer = q / (s^2 h), q / (s sqrt(h / T)) (``evidence`` and
        ``rms``) or q.

        The second is q over its root mean square as estimated from the factors: for a mean over T tokens with
        independent signs the variance of G is h / T."""
        if signal == "raw":
            return scale_out, scale_in
        rows, columns = map(_floored, self.of(index))
        if signal in ("evidence", "rms"):
            tokens = self.smoothed_tokens**0.5
            return _sign(scale_out) * tokens / rows.sqrt(), _sign(scale_in) / columns.sqrt()
        return 1.0 / (_floored(scale_out) * rows), 1.0 / (_floored(scale_in) * columns)

    def column_sizes(self, index: int) -> torch.Tensor:
        """Relative magnitudes of G's columns, (n,) > 0: for independent tokens G_ij^2 is h_ij / T in the mean."""
        return _floored(self.of(index)[1]).sqrt()

    def cost_of_a_flip(
        self, index: int, scale_out: torch.Tensor, scale_in: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(row (m,), column (n,)) vectors with s^2 h = outer(row, column)."""
        rows, columns = map(_floored, self.of(index))
        return _floored(scale_out).square() * rows, _floored(scale_in).square() * columns

    def unit(self, cost: torch.Tensor, signal: SignalRule) -> torch.Tensor | float:
        """What a signal of 1 says of q, where a flip costs ``cost`` = s^2 h: the inverse of ``factors``."""
        if signal == "raw":
            return 1.0
        return cost if signal == "curvature" else (cost / self.smoothed_tokens).sqrt()

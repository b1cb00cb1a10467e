"""How a step enters the accumulators: by what factor, how much of the old stays, and how much it may add at most.

``evidence`` makes M = eta (r_1 + .. + r_t) / sqrt(t), r the signal in standard errors of a step, so that M is in
standard errors of the sum. Older steps fade beyond a fixed number of contributions: what one adds shrinks with t, and
below the accumulator's unit stochastic rounding would become the greater noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mbdist.config.optimizers import BooleanOptimizerConfig

_EVIDENCE_CONTRIBUTIONS = 64  # rounding to int8 then adds half as much variance again to that of noise


@dataclass(frozen=True)
class Integration:
    """Of one step."""

    divisor: float  # of eta
    decay: float  # what the next step keeps of an accumulator, besides beta
    limit: float  # most that one contribution may add, in thresholds


def integration(
    config: BooleanOptimizerConfig,
    steps: int,  # accumulated so far, this one included
    turn: int,  # with ``alternating`` planes: steps of the plane's turn so far, this one included
    contributions: int,  # of a step: micro-batches of all ranks
) -> Integration:
    """The rule of ``config.signal``."""
    if config.signal != "evidence":
        return Integration(1.0, config.decay, config.max_step / contributions)
    window = max(1, _EVIDENCE_CONTRIBUTIONS // contributions)
    t = min(steps, window)
    if config.planes == "alternating":  # accumulators start anew with every plane's turn
        t = min(t, turn)
    following = min(t + 1, window)
    # The noise of a sum grows with the root of the number of contributions, and so does what one may add.
    return Integration(math.sqrt(t), math.sqrt((following - 1) / following), config.max_step / math.sqrt(contributions))

"""The optimizer of the bits."""

from mbdist.optim.boolean import BooleanOptimizer, FlipReport

__all__ = ["BooleanOptimizer", "FlipReport"]

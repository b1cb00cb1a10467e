"""The optimizer of the bits."""

from collections.abc import Callable

from mbdist.optim.boolean import BooleanOptimizer, FlipReport

# Makes one for some layers, from the arguments of ``BooleanOptimizer``; a bench puts a baseline in its place.
OptimizerOfBits = Callable[..., BooleanOptimizer]

__all__ = ["BooleanOptimizer", "FlipReport", "OptimizerOfBits"]

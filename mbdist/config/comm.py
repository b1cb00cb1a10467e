"""Communication of the Boolean signal and of the planes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mbdist.config.section import Section


class CommConfig(Section):
    codec: Literal["fp32", "bf16", "int8", "int4", "sign", "sign_unbiased"] = "sign"
    """How the Boolean signal travels to the worker that owns the accumulators: whole, or in 8, 4 or 1 bits a weight
    beside one scale a row. `sign`, the smallest, ended within 0.1 % of the loss of `fp32`
    (docs/benchmarks.md). `sign_unbiased` draws the signs, so that their mean is the signal."""
    magnitudes: Literal["row", "rank1"] = "rank1"
    """Magnitudes of what a codec of 8 bits or less writes: one a row, or a row's times a column's. The columns' are
    those of the curvature estimate, which every worker has, so both cost the same bytes."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25
    """Messages of many matrices leave together, in buckets of so many MiB."""
    node_size: PositiveInt | Literal["auto"] | None = None
    """Consecutive workers that share a machine: their signals are added up there first, and one message a machine
    crosses the slow links. `auto`: as the launcher placed them. null: all workers send to all; then the bits do not
    depend on how workers are placed."""
    in_flight: PositiveInt = 2
    """So many buckets may be on the wire while the backward pass continues."""
    float_gradients: Literal["fp32", "bf16"] = "fp32"
    """How DeepSpeed reduces the gradients of scales and other trained floats."""
    resident_planes: Literal["none", "frozen", "all"] = "none"
    """With ZeRO stage 3: planes that every worker keeps whole, instead of gathering them in every forward and backward
    pass. `frozen`: those that are not trained, at one bit a weight each. `all`: flips are sent then."""
    resident_floats: Literal["none", "frozen"] = "none"
    """The same of float parameters: `frozen` keeps the embeddings and norms that are not trained."""
    keep_gathered_gb: Annotated[float, Field(ge=0)] = 1.0
    """With ZeRO stage 3: where all that a pass gathers fits into so many GiB, the backward pass uses what the forward
    pass has gathered; else, and with 0, blocks are gathered in both. (To keep planes from step to step is
    `resident_planes`.)"""
    timeout_s: PositiveInt = 600
    """Seconds after which a collective that a peer never joined is an error."""

    @property
    def bucket_bytes(self) -> int:
        return int(self.bucket_mb * 2**20)

    def keeps_gathered(self, size: int) -> bool:
        """Whether ``size`` bytes stay gathered from the forward to the backward pass."""
        return size <= self.keep_gathered_gb * 2**30

    def summing_nodes(self, workers: int) -> int | None:
        """``node_size``, a number by now, where there are several such nodes with something to add up."""
        return self.node_size if isinstance(self.node_size, int) and 1 < self.node_size < workers else None

"""The optimizer of the bits, and that of the scales."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mbdist.config.section import Section

SignalRule = Literal["curvature", "evidence", "rms", "raw"]
_PlaneNumber = Annotated[int, Field(ge=0)]


class BooleanOptimizerConfig(Section):
    planes: Literal["levels", "last", "all", "alternating"] | Annotated[list[_PlaneNumber], Field(min_length=1)] = (
        "last"
    )
    """What flips. `last`: the last plane alone, the paper's choice. `levels`: the bits that take a weight to its next
    level, in whatever planes; one accumulator a weight too. `all`, or a list of plane numbers: each of these planes by
    itself, with an accumulator of its own. `alternating`: one plane after the other."""
    alternate_every: PositiveInt = 10
    """With `alternating`: steps before it is the next plane's turn."""
    signal: SignalRule = "evidence"
    """`evidence`: q summed over the last 64 micro-batches of all workers (since the bit flipped, older ones fade), in
    standard errors of that sum; the threshold is 1 / step_size of them (5), so that noise alone does not fill the
    accumulators, however long the run. `curvature`: q / (s^2 h), so the threshold is where a flip pays to second order;
    wants a small step_size (0.05), signals that stand out of their noise in a few steps, as those of a block's
    reconstruction do, and a loss that is a mean over tokens, with weights that add up to 1. `rms`: q over its root mean
    square. `raw`: q as published."""
    step_size: Annotated[float, Field(ge=0)] = 0.2
    """eta: what one step adds to an accumulator is eta times the signal; a bit flips at 1. 0 turns flips off."""
    adapt_step_size: bool = False
    """Lower eta of a matrix while many more of its weights reach the threshold than the cap lets move, so that those
    that move are the best and not any; it recovers, up to `step_size`."""
    max_step: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Most that one step may add to an accumulator: 1 / max_step steps must agree before a bit flips. Every
    micro-batch of every worker may add its equal share (`evidence`: one by the root of their number), rounded
    stochastically to the accumulator's unit."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What a step keeps of an accumulator, besides beta = 1 - share of bits just flipped (`evidence` has a decay of its
    own instead). Below 1 old evidence fades, and a bit flips only where recent steps agree: noise alone stays at about
    max_step / sqrt(1 - decay^2)."""
    guard: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Against oscillation: after a flip the accumulator starts this far behind zero, so that flipping back takes more
    evidence than flipping did."""
    max_flip_rate: Annotated[float, Field(ge=0, le=1)] = 3e-4
    """Cap: largest share of a matrix's weights that moves in a step, after warm-up; falls to 0 by a cosine."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the cap rises to its full value."""
    curvature_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Smoothing over steps of the curvature estimate h."""
    accumulator: Literal["int8", "int4", "fp32"] = "int8"
    """How an accumulator is kept. `int8` takes a byte a weight; `int4` takes half of one and has a unit of a quarter of
    the threshold; `fp32` is the reference."""
    offload_accumulators: bool = False
    """GPU workers keep their accumulators in pinned host memory. They are fetched while their signals travel, and go
    back while the backward pass continues."""
    turns: PositiveInt = 1
    """Matrices take turns: in a step one in so many sends its signal and flips, and the accumulators of the others stay
    as they are. 4: a quarter of the signal's bytes, and a matrix trains in every fourth step. 1: all in every step."""


class FloatOptimizerConfig(Section):
    lr: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW learning rate of the scales, by default as a share of their size."""
    relative_lr: bool = True
    """Multiply learning rates by the mean magnitude of each parameter tensor (to the nearest power of two), so that one
    value suits every model. false: they are absolute, as in the paper."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW moment decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the learning rate rises; then a cosine to 0."""
    also_train: list[str] = []
    """More float parameters to train, as shell patterns over parameter names (`*norm*`, `*embed_tokens*`)."""
    also_train_lr: Annotated[float, Field(ge=0)] = 2e-3
    """Their learning rate."""

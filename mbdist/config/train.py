"""Length and batch of a run, and what is looked at meanwhile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mbdist.config.section import Section


class TrainConfig(Section):
    steps: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps. 0 converts, measures and saves."""
    sequences_per_step: PositiveInt = 8
    """Global batch: sequences an optimizer step over all workers. Accumulation follows from it."""
    micro_batch: PositiveInt = 4
    """Sequences a worker holds at a time in a forward and backward pass."""
    eval_batch: PositiveInt = 8
    """Sequences a worker holds at a time in an evaluation."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload_activations: bool = False
    """With `activation_checkpointing`: GPU workers hold what the recomputation starts from in pinned host memory
    meanwhile."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping of the float parameters; 0 turns it off."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type. `auto`: bf16 where the processor multiplies it in hardware, else fp32."""
    max_skipped_steps: PositiveInt = 10
    """Stop after so many steps in a row had to be skipped because a loss or a signal was not finite."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 1800
    """A worker that makes no progress for so many seconds says what it was doing and ends, for its launcher to replace
    it. Longer than any one forward or backward pass, collective, evaluation batch, block of a conversion or download of
    a data set takes."""
    track: list[Literal["tensorboard", "wandb"]] = []
    """Besides `metrics.jsonl`: TensorBoard in `run_dir/tensorboard`, W&B as its own `WANDB_*` variables say."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Measure held-out perplexity every so many steps; 0: before and after training alone."""
    check_planes_every: Annotated[int, Field(ge=0)] = 20
    """Compare a hash of the planes over all workers, and log how full the accumulators are, every so many steps; 0
    turns it off."""
    probe_every: Annotated[int, Field(ge=0)] = 0
    """Every so many steps measure what the step's flips did to the loss of its own batch, beside what the second-order
    estimate predicted: one more forward pass there, and 4 bytes a weight. 0: never."""

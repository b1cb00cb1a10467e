"""How a float model becomes multi-Boolean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mbdist.config.data import DataSource
from mbdist.config.section import Section


class ReconstructionConfig(Section):
    steps: Annotated[int, Field(ge=0)] = 40
    """Steps a block, of one batch (2048 tokens) of the calibration text each, over and over; 0 leaves planes as the
    error feedback put them. More steps want more `calibration_tokens`: bits learn a text seen thrice by heart."""
    lr: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW learning rate of the scales, as a share of their size."""
    planes: Literal["levels", "last", "all"] = "levels"
    """What flips, as in `boolean.planes`."""
    step_size: Annotated[float, Field(ge=0)] = 0.03
    """As in `boolean.step_size`, with `boolean.signal: curvature`; 0 trains scales alone."""
    max_flip_rate: Annotated[float, Field(ge=0, le=1)] = 6e-3
    """As in `boolean.max_flip_rate`: errors of a block are seen so well that far more may flip here."""
    accumulator: Literal["int8", "int4", "fp32"] = "int8"
    """As in `boolean.accumulator`."""


class ConvertConfig(Section):
    planes: Annotated[int, Field(ge=1, le=8)] = 2
    """K: sign planes of every matrix. Ignored where `model.path` is a multi-Boolean model already."""
    bits: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Budget of average bits a weight, scales included (2.5, say), instead of `planes`: every matrix gets the number of
    planes with which the budget does most."""
    max_planes: Annotated[int, Field(ge=1, le=8)] = 4
    """With `bits`: most planes that a matrix may get."""
    allocation: Literal["second_order", "residual"] = "second_order"
    """With `bits`: what is minimised. `second_order`: the squares of the estimated changes of the loss by the errors of
    calibrated planes, whatever `init`; needs text. `residual`: the paper's objective on the norms of the residuals, all
    layers alike in importance; needs none."""
    init: Literal["svid", "joint", "calibrated"] = "calibrated"
    """How planes are found. `svid`: one after the other (arXiv 2505.22811). `joint`: all together, in sweeps of nearest
    levels and least squares. `calibrated`: joint in the metric of the layers' inputs and output gradients, then error
    feedback on the signs; it needs text, and is worth orders of magnitude of perplexity."""
    calibration: DataSource | None = None
    """Text to calibrate on. Default: the training text, without the windows that are held out for evaluation."""
    calibration_tokens: PositiveInt = 32768
    """Tokens of it that are looked at."""
    sequential: bool = False
    """With `calibrated`: convert a block before the inputs of the next one are computed, so that later blocks see the
    errors of earlier ones. false: all blocks see the float model's activations."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """With `calibrated`: bits and scales of every block are finetuned to the float block's outputs as soon as it is
    converted, on the calibration text."""
    include: list[str] = ["*"]
    """Layer names to convert, as shell patterns over module names (`model.layers.*.mlp.*`)."""
    exclude: list[str] = []
    """Layer names to leave in floating point; the LM head and the embeddings always are."""

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are finetuned to the float blocks' outputs."""
        return self.init == "calibrated" and self.reconstruction.steps > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether converting takes text."""
        return self.init == "calibrated" or (self.bits is not None and self.allocation == "second_order")

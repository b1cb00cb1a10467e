"""The section ``checkpoint``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from mbdist.config.section import Section


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = None
    """Save the run's state after every so many steps; null: by time alone."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30
    """Save it when so much time has passed; null: by steps alone. A run that is told to stop saves too."""
    keep_last: PositiveInt = 2
    """How many checkpoints stay in `run_dir/checkpoints`."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """With `train.eval_every`: save after every evaluation, and keep so many of the lowest perplexity too."""
    resume: str = "auto"
    """`auto`: go on from the last checkpoint of an unfinished run in `run_dir`, where there is one; a finished run
    starts anew. `none`: start anew, which removes the folder's checkpoints. Or the folder of a checkpoint. The number
    of workers, the ZeRO stage and the micro-batch may be others than before."""

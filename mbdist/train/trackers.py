"""Copies of a run's numbers for TensorBoard and Weights & Biases, whose packages are optional."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mbdist.errors import UserError

if TYPE_CHECKING:
    from mbdist.config.schema import RunConfig

Log = Callable[[dict[str, float], int], None]  # takes values by name, and the step

_OF_A_STEP = ("loss", "kl", "cross_entropy", "flip_rate", "learning_rate", "gradient_norm", "tokens_per_s")


def check_installed(config: RunConfig) -> None:
    """Raises UserError for one of ``train.track`` whose package is not here."""
    for package in config.train.track:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"train.track names {package}, which is not installed: pip install 'mbdist[tracking]'")


def open_trackers(config: RunConfig, first_step: int) -> list[Log]:
    """Those of ``train.track``. What an earlier attempt logged after ``first_step`` is replaced."""
    return [_OPEN[name](config, first_step) for name in config.train.track]


def scalars(event: str, values: dict) -> dict[str, float]:
    """What an event of ``metrics.jsonl`` has to show over steps."""
    if event == "step":
        found = {f"train/{name}": values[name] for name in _OF_A_STEP if values.get(name) is not None}
        return {**found, "train/bytes_sent": sum(values["bytes_sent"].values())}
    if event == "eval":
        return {f"perplexity/{values['name']}": values["perplexity"]}
    return {}


def _tensorboard(config: RunConfig, first_step: int) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(Path(config.run_dir) / "tensorboard"), purge_step=first_step + 1)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(config: RunConfig, first_step: int) -> Log:
    import wandb

    # One run a folder, however often it is resumed. Project, account and mode come from its own WANDB_* variables.
    run_id = hashlib.sha256(config.run_dir.encode()).hexdigest()[:16]
    name = Path(config.run_dir).name
    run = wandb.init(id=run_id, name=name, resume="allow", dir=config.run_dir, config=config.model_dump(mode="json"))
    return lambda values, step: run.log(values, step=step)


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb}

"""``mbdist bench checkpoint``: what writing checkpoints in the background costs the steps meanwhile.

One real run (`mbdist launch local`) of a random model saves every few steps. Its steps are told apart by its own log:
those in which a snapshot was taken or a thread was writing, and the others, of which the nearest before and after are
the baseline: machines get slower and faster while they run.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from mbdist.bench.small_run import finish, records_of, small_model, start
from mbdist.config import RunConfig

_HIDDEN, _BLOCKS = 768, 8
_WARM_UP_STEPS = 2


def bench_checkpoint(config: RunConfig, json_file: Path | None) -> dict:
    """Print, write into ``json_file`` where given, and return the median of the ratios of the seconds of steps with a
    checkpoint being saved to those beside them without, and what a checkpoint is: its MB, seconds of writing, seconds
    that its snapshot held up a step."""
    with tempfile.TemporaryDirectory() as scratch:
        model = small_model(config.model, Path(scratch) / "model", _HIDDEN, _BLOCKS)
        config = config.model_copy(update={"model": model, "run_dir": f"{scratch}/run"})
        finish(start(config), config)
        records = records_of(config)
        saved = [record for record in records if record["event"] == "checkpoint"]
        num_bytes = sum(file.stat().st_size for file in Path(saved[-1]["folder"]).iterdir())
    steps = [record for record in records if record["event"] == "step" and record["step"] > _WARM_UP_STEPS]
    saving = [any(_overlap(step, each) for each in saved) for step in steps]
    seconds = [step["seconds"] for step in steps]
    meanwhile = [each for each, busy in zip(seconds, saving, strict=True) if busy]
    alone = [each for each, busy in zip(seconds, saving, strict=True) if not busy]
    (start_record, *_) = [record for record in records if record["event"] == "start"]
    result = {
        "step_time_ratio": round(statistics.median(_beside_others(seconds, saving)), 3),
        "step_s": round(statistics.median(alone), 3),
        "step_while_saving_s": round(statistics.median(meanwhile), 3),
        "steps": {"while_saving": len(meanwhile), "others": len(alone)},
        "checkpoint_mb": round(num_bytes / 1e6, 1),
        "writing_s": round(statistics.median(each["seconds"] for each in saved), 3),
        "snapshot_s": round(statistics.median(each["blocked_s"] for each in saved), 3),
        "trained_weights": sum(start_record["trained_weights"].values()),
        "workers": start_record["world_size"],
        "tokens_per_step": config.tokens_per_step,
        "command": "mbdist bench checkpoint",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    Console().print_json(data=result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _beside_others(seconds: list[float], saving: list[bool]) -> list[float]:
    """The seconds of every step in which one was saved, over the mean of the nearest others before and after it."""
    others = [number for number, saved in enumerate(saving) if not saved]
    ratios = []
    for number, saved in enumerate(saving):
        before, after = [o for o in others if o < number], [o for o in others if o > number]
        if saved and before and after:
            ratios.append(2 * seconds[number] / (seconds[before[-1]] + seconds[after[0]]))
    return ratios


def _overlap(step: dict, checkpoint: dict) -> bool:
    """Whether the checkpoint was saved within the step; events are logged at their end."""
    begun = checkpoint["time"] - checkpoint["seconds"] - checkpoint["blocked_s"]
    return step["time"] - step["seconds"] < checkpoint["time"] and begun < step["time"]

"""How a run is doing, as its folder tells."""

from __future__ import annotations

import json
import time
from pathlib import Path

from mbdist.checkpoint import complete_checkpoints
from mbdist.errors import UserError
from mbdist.file_lock import is_locked
from mbdist.train.metrics import read_metrics
from mbdist.train.run_folder import LOCK


def describe_run(folder: Path) -> str:
    """A few lines on state, step, loss, speed, workers, checkpoints and the last error. Raises UserError for a folder
    without a run."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{folder} is not the folder of a run that began: it has no metrics.jsonl")
    last: dict[str, dict] = {}
    latest = {"event": "nothing", "time": time.time()}
    resumed = 0
    for record in read_metrics(metrics):
        last[record["event"]] = latest = record
        resumed += record["event"] == "resumed"
    lines = [f"{folder}: {_state(folder, latest)}"]
    if start := last.get("start"):
        lines.append(
            f"workers: {start['world_size']} on {start['device']}, ZeRO stage {start['zero_stage']}, signal as "
            f"{start['codec']}" + (f"; resumed {resumed} times" if resumed else "")
        )
    if latest["event"] == "converted_layer":
        lines.append(f"converting: {latest['done']} of {latest['layers']} layers")
    if step := last.get("step"):
        lines.append(
            f"step {step['step']}/{start['steps']}: loss {step['loss']:.4g}, flip rate {step['flip_rate']:.1e}, "
            f"{step['tokens_per_s']:,.0f} tokens/s, {_ago(step['time'])}"
        )
    if measured := last.get("eval"):
        lines.append(f"perplexity, {measured['name']}: {measured['perplexity']:,.2f}")
    if found := complete_checkpoints(folder / "checkpoints"):
        lines.append(f"checkpoint: {found[-1].name}, {_ago((found[-1] / 'complete').stat().st_mtime)}")
    elif step:
        lines.append("checkpoint: none yet")
    if (refused := last.get("checkpoint_failed")) and refused["time"] > last.get("checkpoint", refused)["time"] - 1e-9:
        lines.append(f"last checkpoint failed, {_ago(refused['time'])}: {refused['why']}")
    errors = [last[event] for event in ("failed", "workers_lost") if event in last]
    if error := max(errors, key=lambda record: record["time"], default=None):
        lines.append(f"last error, {_ago(error['time'])}: {error['error']}")
    return "\n".join(lines)


def _state(folder: Path, latest: dict) -> str:
    if (folder / "summary.json").exists():
        seconds = json.loads((folder / "summary.json").read_text())["wall_s"]
        return f"finished, after {seconds:,.0f} s"
    if latest["event"] == "failed":
        return "failed"
    if latest["event"] == "stopped":
        return f"stopped after step {latest['step']}; the same command goes on from there"
    if is_locked(folder / LOCK):
        return f"running ({latest['event']}, {_ago(latest['time'])})"
    return f"not running here; its last sign of life was {_ago(latest['time'])} ({latest['event']})"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

"""``mbdist bench faults``: a run whose workers are killed again and again, beside one that nobody disturbs.

The run is real (`mbdist launch local`: Ray, DeepSpeed, processes), its model a small random one of the config's
architecture. A worker, drawn by chance, gets SIGKILL at a moment drawn by chance: some way into some step, whatever
phase that is in, or into the writing of a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, set_seed

from mbdist.config import RunConfig, write_config
from mbdist.config.schema import ModelConfig
from mbdist.errors import RunError
from mbdist.model.loading import load_model_config, load_tokenizer
from mbdist.train.metrics import read_metrics

_SHAPE = {  # small: what is measured is what a restart costs besides the model
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_POLL_S = 0.01
_RECOVERY_TIMEOUT_S = 300


def bench_faults(config: RunConfig, kills: int, seed: int, json_file: Path | None) -> dict:
    """Print, write into ``json_file`` where given, and return: kills, kills that the run recovered from, the median
    and all of the seconds from a kill to the next finished step, steps done twice, and whether both runs end with the
    same planes."""
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        model = _small_model(config.model, Path(scratch) / "model")
        base = config.model_copy(update={"model": model})
        whole = base.model_copy(update={"run_dir": f"{scratch}/whole"})
        disturbed = base.model_copy(update={"run_dir": f"{scratch}/disturbed"})
        expected = _finish(_start(whole), whole)
        console.print(f"undisturbed: {config.train.steps} steps; now with {kills} kills")
        process = _start(disturbed)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(process.kill)
            seconds = _disturb(process, disturbed, kills, random.Random(seed), console)
            ended = _finish(process, disturbed)
        done = [record["step"] for record in _records(disturbed) if record["event"] == "step"]
    result = {
        "kills": kills,
        "recovered": len(seconds),
        "median_recovery_s": round(statistics.median(seconds), 1),
        "recovery_s": [round(each, 1) for each in seconds],
        "steps": config.train.steps,
        "steps_redone": len(done) - len(set(done)),
        "planes_match": ended["planes_sha256"] == expected["planes_sha256"],
        "command": f"mbdist bench faults --kills {kills} --seed {seed}",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    console.print_json(data=result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _small_model(source: ModelConfig, folder: Path) -> ModelConfig:
    shape = load_model_config(source)
    shape.update(_SHAPE)
    set_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def _start(config: RunConfig) -> subprocess.Popen:
    path = Path(f"{config.run_dir}.yaml")
    write_config(config, path)
    command = [sys.executable, "-m", "mbdist.cli.main", "launch", "local", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen, config: RunConfig) -> dict:
    output, _ = process.communicate()
    if process.returncode:
        raise RunError(f"the run failed:\n{output[-4000:]}")
    return json.loads((Path(config.run_dir) / "summary.json").read_text())


def _records(config: RunConfig) -> list[dict]:
    metrics = Path(config.run_dir) / "metrics.jsonl"
    return list(read_metrics(metrics)) if metrics.exists() else []


def _disturb(
    process: subprocess.Popen, config: RunConfig, kills: int, chance: random.Random, console: Console
) -> list[float]:
    """Kill ``kills`` times; the seconds of every recovery."""
    targets = sorted(chance.choices(range(1, config.train.steps - 2), k=kills))
    recoveries = []
    for number, target in enumerate(targets, start=1):
        records = _await(process, config, lambda records, target=target: _last_step(records) >= target)
        steps = [record["seconds"] for record in records if record["event"] == "step"]
        time.sleep(chance.uniform(0, 2 * statistics.median(steps)))
        start = [record for record in _records(config) if record["event"] == "start"][-1]
        before = len(_records(config))
        os.kill(chance.choice(start["workers"])["pid"], signal.SIGKILL)
        killed = time.time()
        after = _await(process, config, lambda records, before=before: _has_resumed(records[before:]))
        next_step = next(r for r in reversed(after) if r["event"] == "step")
        recoveries.append(next_step["time"] - killed)
        console.print(f"kill {number} after step {_last_step(records)}: {recoveries[-1]:.1f} s")
    return recoveries


def _last_step(records: list[dict]) -> int:
    return max((record["step"] for record in records if record["event"] == "step"), default=0)


def _has_resumed(records: list[dict]) -> bool:
    """Whether workers started anew and finished a step."""
    starts = [i for i, record in enumerate(records) if record["event"] == "start"]
    return bool(starts) and any(record["event"] == "step" for record in records[starts[-1] :])


def _await(process: subprocess.Popen, config: RunConfig, holds) -> list[dict]:
    deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
    while not holds(records := _records(config)):
        if process.poll() is not None:
            raise RunError(f"the run ended before it was done:\n{process.communicate()[0][-4000:]}")
        if time.monotonic() > deadline:
            raise RunError(f"no progress in {_RECOVERY_TIMEOUT_S} s; the run is in {config.run_dir}")
        time.sleep(_POLL_S)
    return records

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
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from mbdist.bench.small_run import finish, records_of, small_model, start
from mbdist.config import RunConfig
from mbdist.errors import RunError

_HIDDEN, _BLOCKS = 64, 2  # small: what is measured is what a restart costs besides the model
_POLL_S = 0.01
_RECOVERY_TIMEOUT_S = 300


def bench_faults(config: RunConfig, kills: int, seed: int, json_file: Path | None) -> dict:
    """Print, write into ``json_file`` where given, and return: kills, kills that the run recovered from, the median
    and all of the seconds from a kill to the next finished step, steps done twice, and whether both runs end with the
    same planes."""
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        model = small_model(config.model, Path(scratch) / "model", _HIDDEN, _BLOCKS)
        base = config.model_copy(update={"model": model})
        whole = base.model_copy(update={"run_dir": f"{scratch}/whole"})
        disturbed = base.model_copy(update={"run_dir": f"{scratch}/disturbed"})
        expected = finish(start(whole), whole)
        console.print(f"undisturbed: {config.train.steps} steps; now with {kills} kills")
        process = start(disturbed)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(process.kill)
            seconds = _disturb(process, disturbed, kills, random.Random(seed), console)
            ended = finish(process, disturbed)
        done = [record["step"] for record in records_of(disturbed) if record["event"] == "step"]
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
        start = [record for record in records_of(config) if record["event"] == "start"][-1]
        before = len(records_of(config))
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
    while not holds(records := records_of(config)):
        if process.poll() is not None:
            raise RunError(f"the run ended before it was done:\n{process.communicate()[0][-4000:]}")
        if time.monotonic() > deadline:
            raise RunError(f"no progress in {_RECOVERY_TIMEOUT_S} s; the run is in {config.run_dir}")
        time.sleep(_POLL_S)
    return records

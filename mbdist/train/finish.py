"""The end of a run: reload what was saved in a new process, compare, and write ``summary.json``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from mbdist.config.schema import RunConfig
from mbdist.errors import RunError
from mbdist.train.metrics import read_metrics

_RELOAD_TIMEOUT_S = 1800


def finish_run(config: RunConfig, started: float) -> dict:
    """Verify the saved model and summarise the run (``started``: time.time() at its begin).

    Raises RunError where the planes that load are not the planes that were trained.
    """
    run_dir = Path(config.run_dir)
    records = list(read_metrics(run_dir / "metrics.jsonl"))
    start = [record for record in records if record["event"] == "start"][-1]  # of a run that was resumed, the last
    saved = [record for record in records if record["event"] == "saved"][-1]
    reloaded = _reload(saved["folder"], config.sample_prompt, config.model.trust_remote_code)
    summary = {
        "model": config.model.path,
        "planes": start["planes"],
        "bits_per_weight": round(start["bits_per_weight"], 4),
        "world_size": start["world_size"],
        "zero_stage": start["zero_stage"],
        "steps": start["steps"],
        "perplexity": {record["name"]: record["perplexity"] for record in records if record["event"] == "eval"},
        "planes_sha256": {"saved": saved["planes_sha256"], "reloaded": reloaded["planes_sha256"]},
        "generated": reloaded.get("generated"),
        "wall_s": round(time.time() - started, 1),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if saved["planes_sha256"] != reloaded["planes_sha256"]:
        raise RunError(f"{saved['folder']} loads with other planes than were saved; see {run_dir / 'summary.json'}")
    return summary


def _reload(folder: str, prompt: str | None, trust_remote_code: bool) -> dict:
    command = [sys.executable, "-m", "mbdist.train.reload_check", folder]
    if prompt:
        command += ["--prompt", prompt]
    if trust_remote_code:
        command.append("--trust-remote-code")
    # Ray removes a job's folder when its driver leaves the cluster; libraries do not load from a place that is gone.
    done = subprocess.run(command, capture_output=True, text=True, timeout=_RELOAD_TIMEOUT_S, cwd=folder)
    if done.returncode:
        raise RunError(f"the saved model {folder} does not load again:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])

"""``mbdist bench levers``: what every setting that saves memory saves, and what it costs, one at a time.

Runs are real (`mbdist launch local`), their model a random one of the config's architecture. The peak is what the
workers' own log says of the fullest of them, beside what the plan predicted of the same run.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from mbdist.bench.small_run import finish, records_of, small_model, start
from mbdist.bench.table import table_of
from mbdist.config import RunConfig, with_changes
from mbdist.errors import ConfigError

_HIDDEN, _BLOCKS = 768, 8
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Lever:
    name: str
    changes: dict = field(default_factory=dict)  # to the config, as {"section.key": value}


AS_CONFIGURED = Lever("as configured")
_CHECKPOINTING = {"train.activation_checkpointing": True}
_CURVATURE = {"boolean.signal": "curvature", "boolean.step_size": 0.05}  # int4 accumulators want it
LEVERS = [
    Lever("ZeRO stage 2", {"cluster.zero_stage": 2}),
    Lever("frozen planes resident", {"comm.resident_planes": "frozen"}),
    Lever("all planes resident", {"comm.resident_planes": "all"}),
    Lever("blocks gathered in both passes", {"comm.keep_gathered_gb": 0}),
    Lever("teacher sharded", {"loss.teacher_placement": "sharded"}),
    Lever("no teacher", {"loss.teacher": "none"}),
    Lever("activation checkpointing", _CHECKPOINTING),
    Lever("activation checkpointing, offloaded", _CHECKPOINTING | {"train.offload_activations": True}),
    Lever("half the micro-batch", {"train.micro_batch": 2}),
    Lever("logits of 128 tokens at a time", {"loss.chunk_tokens": 128}),
    Lever("logits of all tokens at once", {"loss.chunk_tokens": 1 << 20}),
    Lever("accumulators offloaded", {"boolean.offload_accumulators": True}),
    Lever("curvature signal", _CURVATURE),
    Lever("curvature signal, int4 accumulators", _CURVATURE | {"boolean.accumulator": "int4"}),
    Lever("a quarter of the matrices a step", {"boolean.turns": 4}),
]


def bench_levers(config: RunConfig, json_file: Path | None, levers: list[Lever] | None = None) -> list[dict]:
    """Print, write into ``json_file`` where given, and return a row a lever: the peak of the fullest worker (MB), that
    over the peak as configured, predicted over measured, and times and sent bytes of a step over those as configured
    (None where nothing is sent). Levers that the device does not admit are left out, with a word."""
    console, rows = Console(), []
    if not torch.cuda.is_available():
        config = with_changes(config, {"cluster.device": "cpu"})
    with tempfile.TemporaryDirectory() as scratch:
        model = small_model(config.model, Path(scratch) / "model", _HIDDEN, _BLOCKS)
        for number, lever in enumerate([AS_CONFIGURED, *(LEVERS if levers is None else levers)]):
            try:
                changed = with_changes(config, lever.changes)
            except ConfigError as error:
                console.print(f"{lever.name}: left out, {error}")
                continue
            run = changed.model_copy(update={"model": model, "run_dir": f"{scratch}/{number}"})
            finish(start(run), run)
            rows.append({"lever": lever.name, "changes": lever.changes, **_measured(records_of(run))})
            console.print(f"{lever.name}: {rows[-1]['peak_mb']} MB")
    first = rows[0]
    for row in rows:
        for ratio, value in (("peak_ratio", "peak_mb"), ("step_time_ratio", "step_s"), ("sent_ratio", "sent_mb")):
            row[ratio] = round(row[value] / first[value], 3) if first[value] else None  # one worker sends nothing
    result = {
        "rows": rows,
        "workers": config.cluster.most_workers,
        "zero_stage": config.cluster.zero_stage,
        "tokens_per_step": config.tokens_per_step,
        "command": "mbdist bench levers",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(table_of(rows, without=["changes"]))
    return rows


def _measured(records: list[dict]) -> dict:
    (memory,) = (record for record in records if record["event"] == "memory")
    steps = [record for record in records if record["event"] == "step" and record["step"] > _WARM_UP_STEPS]
    return {
        "peak_mb": round(memory["measured"] / 1e6, 1),
        "predicted_over_measured": round(memory["predicted"] / memory["measured"], 3),
        "step_s": round(statistics.median(step["seconds"] for step in steps), 3),
        "sent_mb": round(statistics.median(sum(step["bytes_sent"].values()) for step in steps) / 1e6, 3),
    }

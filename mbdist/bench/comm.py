"""``mbdist bench comm``: bytes and seconds of a finetuning step on links of any speed, beside DeepSpeed's dense one.

Ranks are processes in network namespaces of their own, so the kernel counts what each sends and a token bucket holds
its uplink to a rate. Both kinds train the linear layers and what ``floats.also_train`` names, on the same batches,
without a teacher (it sends nothing); frozen floats are whole on every rank in both. With ``everything`` trained the
traffic of embeddings and head comes on top, dense on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from mbdist.bench.links import INTERFACE, Host, joined_hosts, set_rate
from mbdist.bench.process import in_own_process, prepare_alone
from mbdist.bench.quality import changed_config
from mbdist.bench.table import table_of
from mbdist.config import RunConfig
from mbdist.errors import RunError

_SHARED = {  # by all measurements: no teacher, a small batch, a conversion that takes seconds
    "convert.init": "joint",
    "convert.reconstruction.steps": 0,
    "loss.teacher": "none",
    "train.steps": 100,
    "train.micro_batch": 1,
    "train.check_planes_every": 0,
    "cluster.device": "cpu",
    "cluster.cpus_per_worker": 1,
}
_PORT = "29533"  # on the first rank's host, where nothing else listens
_SECONDS_A_PHASE = 3600
_STEPS = {10: 1, 100: 2}  # at slow rates a dense step takes minutes; others are measured three times


def bench_comm(
    config: RunConfig,
    ranks: list[int],
    stages: list[int],
    codecs: list[str],
    rates: list[int],  # Mbit/s; 0 for no limit
    json_file: Path | None,
    everything: bool = False,
) -> dict:
    """Bytes for every number of ranks, stage and codec; with the fewest ranks and the config's codec seconds for every
    rate, and the bytes with ``everything`` trained. Prints tables, writes ``json_file`` after every part where given,
    returns its content."""
    console = Console()
    rates = [0, *(mbit for mbit in rates if mbit)]  # what the others are compared with
    codec = config.comm.codec
    measured = list(dict.fromkeys([*codecs, codec]))
    result: dict[str, list[dict]] = {"bytes": [], "time": []}
    with tempfile.TemporaryDirectory() as scratch:
        base = config.model_copy(update={"run_dir": scratch})
        in_own_process(_prepare, _on(base, 1, 0))
        for count in ranks:
            with joined_hosts(count) as hosts:
                for stage in stages:
                    slow = rates if count == min(ranks) else [0]
                    dense = _run("dense", _on(base, count, stage), hosts, slow, ["fp32"])
                    for resident in ("none", "frozen") if stage == 3 else ("none",):
                        run = _on(base, count, stage, resident)
                        ours = _run("boolean", run, hosts, slow if resident == "none" else [0], measured)
                        result["bytes"] += _bytes_rows(count, stage, resident, "linear", codecs, ours, dense)
                        if resident == "none" and count == min(ranks):
                            result["time"] += _time_rows(stage, codec, slow, ours, dense)
                    if everything and count == min(ranks):
                        floats = base.floats.model_copy(update={"also_train": ["*"]})
                        run = _on(base.model_copy(update={"floats": floats}), count, stage)
                        dense = _run("dense", run, hosts, [0], ["fp32"])
                        ours = _run("boolean", run, hosts, [0], [codec])
                        result["bytes"] += _bytes_rows(count, stage, "none", "everything", [codec], ours, dense)
                    if json_file is not None:
                        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(table_of(result["bytes"], "Bytes that a rank sends in a step", without=["counted"]))
    console.print(table_of(result["time"], f"Seconds of a step, {min(ranks)} ranks"))
    return result


def _on(config: RunConfig, ranks: int, stage: int, resident: str = "none") -> RunConfig:
    of_this_run = {
        "train.sequences_per_step": ranks,
        "cluster.workers": ranks,
        "cluster.zero_stage": stage,
        "comm.resident_planes": resident,
        "comm.resident_floats": "frozen" if stage == 3 else "none",
    }
    return changed_config(config, _SHARED | of_this_run)


def _prepare(config: RunConfig) -> dict:
    from mbdist.optim import BooleanOptimizer

    prepare_alone(config, BooleanOptimizer)
    return {}


def _run(kind: str, config: RunConfig, hosts: list[Host], rates: list[int], codecs: list[str]) -> dict[str, dict]:
    """{phase: means over ranks}: a phase a codec without a limit, and one a rate with the config's codec."""
    unlimited = [{"name": codec, "codec": codec, "steps": 3, "mbit": 0} for codec in codecs]
    limited = [
        {"name": f"{mbit} Mbit", "codec": config.comm.codec, "steps": _STEPS.get(mbit, 3), "mbit": mbit}
        for mbit in sorted(rates, reverse=True)
        if mbit
    ]
    phases = unlimited + limited
    with tempfile.TemporaryDirectory() as folder:
        spec = {"kind": kind, "config": config.model_dump(mode="json"), "phases": phases, "folder": folder}
        spec_file = Path(folder) / "spec.json"
        spec_file.write_text(json.dumps(spec))
        set_rate(hosts, None)
        workers = [_start(host, rank, hosts, spec_file) for rank, host in enumerate(hosts)]
        try:
            for phase in phases:
                _wait(workers, [Path(folder) / f"ready.{phase['name']}.{r}" for r in range(len(hosts))])
                set_rate(hosts, phase["mbit"] or None)
                (Path(folder) / f"go.{phase['name']}").touch()
            _wait(workers, [Path(folder) / f"result.{rank}.json" for rank in range(len(hosts))])
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        of_ranks = [json.loads((Path(folder) / f"result.{rank}.json").read_text()) for rank in range(len(hosts))]
    return {phase["name"]: _mean([results[i] for results in of_ranks]) for i, phase in enumerate(phases)}


def _start(host: Host, rank: int, hosts: list[Host], spec_file: Path) -> subprocess.Popen:
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_WORLD_SIZE": "1",  # each is a machine of its own
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": _PORT,
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    command = host.command([sys.executable, "-m", "mbdist.bench.comm_worker", str(spec_file)])
    with (spec_file.parent / f"log.{rank}").open("w") as log:  # the worker has a handle of its own
        return subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT)


def _wait(workers: list[subprocess.Popen], files: list[Path]) -> None:
    """Until the files are there. Raises RunError, with the log's end, where a worker has failed."""
    deadline = time.monotonic() + _SECONDS_A_PHASE
    while not all(file.exists() for file in files):
        for rank, worker in enumerate(workers):
            if worker.poll() or time.monotonic() > deadline:
                log = (files[0].parent / f"log.{rank}").read_text()
                raise RunError(f"rank {rank} of bench comm failed or took too long:\n{log[-3000:]}")
        time.sleep(0.05)


def _mean(of_ranks: list[dict]) -> dict:
    count = len(of_ranks)
    counted = {key for result in of_ranks for key in result["counted"]}
    return {
        **{key: sum(result[key] for result in of_ranks) / count for key in ("step_s", "bytes", "coding_s")},
        "counted": {key: sum(result["counted"].get(key, 0) for result in of_ranks) / count for key in counted},
    }


def _bytes_rows(
    ranks: int, stage: int, resident: str, trained: str, codecs: list[str], ours: dict, dense: dict
) -> list[dict]:
    dense_bytes = dense["fp32"]["bytes"]
    return [
        {
            "ranks": ranks,
            "stage": stage,
            "codec": codec,
            "resident": resident,
            "trained": trained,
            "ours_bytes": round(ours[codec]["bytes"]),
            "dense_bytes": round(dense_bytes),
            "ratio": round(dense_bytes / ours[codec]["bytes"], 2),
            "coding_share": round(ours[codec]["coding_s"] / ours[codec]["step_s"], 4),
            "counted": {name: round(size) for name, size in ours[codec]["counted"].items()},
        }
        for codec in codecs
    ]


def _time_rows(stage: int, codec: str, rates: list[int], ours: dict, dense: dict) -> list[dict]:
    """Communication is what a step takes longer than without a limit."""
    free_ours, free_dense = ours[codec], dense["fp32"]
    rows = []
    for mbit in rates:
        limited = f"{mbit} Mbit"
        step, dense_step = (ours[limited], dense[limited]) if mbit else (free_ours, free_dense)
        rows.append(
            {
                "mbit": mbit or None,
                "stage": stage,
                "codec": codec,
                "ours_s": round(step["step_s"], 3),
                "dense_s": round(dense_step["step_s"], 3),
                "ours_comm_s": round(step["step_s"] - free_ours["step_s"], 3),
                "dense_comm_s": round(dense_step["step_s"] - free_dense["step_s"], 3),
            }
        )
    return rows

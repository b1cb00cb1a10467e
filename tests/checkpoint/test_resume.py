"""Runs that are killed go on from their checkpoint and end with the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mbdist.train.metrics import read_metrics

STEPS = 8


def settings_of(run_dir, model, workers=1, stage=2, lr=1e-2, **checkpoint):
    settings = models.run_settings(
        run_dir,
        model,
        cluster={"workers": workers, "zero_stage": stage, "cpus_per_worker": 1},
        floats={"lr": lr},
        data={"max_eval_windows": 2},
        train={"steps": STEPS},
        checkpoint={"every_steps": 3, **checkpoint},
    )
    return settings


def start(settings, folder):
    path = Path(folder) / f"{Path(settings['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    workers = settings["cluster"]["workers"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    command = [sys.executable, *torchrun, "-m", "mbdist.cli.main", "train", str(path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(settings, folder, expect=0):
    output, _ = (process := start(settings, folder)).communicate(timeout=300)
    assert process.returncode == expect, output[-3000:]
    return output


def interrupted(settings, folder, how, event="checkpoint"):
    """Start the run and send its processes a signal when the event is logged; what it printed."""
    process = start(settings, folder)
    log = Path(settings["run_dir"]) / "metrics.jsonl"
    while not (log.exists() and any(record["event"] == event for record in read_metrics(log))):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    if how == signal.SIGKILL:
        # torchrun's workers are in sessions of their own, and outlive it
        subprocess.run(["pkill", "-KILL", "-f", f"{folder}/{log.parent.name}.yaml"], check=True)
    else:
        process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def outcome(run_dir):
    """(weights that were saved, {step: what it logged that a bit would change})."""
    weights = load_file(Path(run_dir) / "model/model.safetensors")
    keys = ("loss", "kl", "flips", "flipped_back", "flip_candidates", "learning_rate", "gradient_norm")
    steps = {
        r["step"]: {k: r[k] for k in keys}
        for r in read_metrics(Path(run_dir) / "metrics.jsonl")
        if r["event"] == "step"
    }
    return weights, steps


def check_same(one, other):
    weights, steps = one
    assert steps == other[1]
    assert weights.keys() == other[0].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other[0][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, llama_folder, workers, stage):
    whole = settings_of(tmp_path / "whole", llama_folder, workers, stage)
    finish(whole, tmp_path)
    killed = settings_of(tmp_path / "killed", llama_folder, workers, stage)
    interrupted(killed, tmp_path, signal.SIGKILL)
    output = finish(killed, tmp_path)
    assert "resumed after step" in output
    expected = outcome(tmp_path / "whole")
    assert sum(sum(step["flips"].values()) for step in expected[1].values()) > 100
    assert any(sum(step["flipped_back"].values()) for step in expected[1].values())
    check_same(outcome(tmp_path / "killed"), expected)


@pytest.mark.slow
def test_other_workers_and_another_stage_go_on_with_the_same_flips(tmp_path, llama_folder):
    """With the scales at rest: the order in which DeepSpeed adds up their gradients depends on the workers."""
    finish(settings_of(tmp_path / "whole", llama_folder, 1, 0, lr=0.0), tmp_path)
    expected = outcome(tmp_path / "whole")
    run_dir = tmp_path / "moving"
    interrupted(settings_of(run_dir, llama_folder, 2, 3, lr=0.0), tmp_path, signal.SIGKILL)
    output = finish(settings_of(run_dir, llama_folder, 3, 1, lr=0.0), tmp_path)
    assert "resumed after step" in output
    weights, steps = outcome(run_dir)
    assert {number: step["flips"] for number, step in steps.items()} == {
        number: step["flips"] for number, step in expected[1].items()
    }
    assert all(torch.equal(weights[name], expected[0][name]) for name in weights if ".plane_" in name)
    resumed = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == "resumed"][-1]
    assert resumed["changed"]["cluster.workers"] == "2 -> 3"


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_says_so(tmp_path, llama_folder):
    finish(settings_of(tmp_path / "whole", llama_folder), tmp_path)
    settings = settings_of(tmp_path / "told", llama_folder, every_steps=None)
    code, output = interrupted(settings, tmp_path, signal.SIGUSR1, event="step")
    assert code == 75 and "the same command goes on from there" in output
    finish(settings, tmp_path)
    check_same(outcome(tmp_path / "told"), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder, keep_last=3)
    interrupted(settings, tmp_path, signal.SIGKILL)
    (folder,) = (tmp_path / "run/checkpoints").glob("step_?")
    other = finish({**settings, "seed": 5}, tmp_path, expect=2)
    assert "seed: 0 -> 5" in other and "Traceback" not in other
    (tmp_path / "run/checkpoints/step_99").mkdir()  # without its marker: was not written to the end
    shard = folder / "shard_0.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its content is not what was written" in finish(settings, tmp_path, expect=2)
    shard.write_bytes(whole[:-100])
    assert "bytes were written" in (cut := finish(settings, tmp_path, expect=2)) or " were written" in cut
    shard.write_bytes(whole)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 0}))
    assert "format 0" in finish(settings, tmp_path, expect=2)
    (folder / "state.json").write_text(json.dumps(state))
    assert "resumed after step 3" in finish(settings, tmp_path)


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder)
    process = start(settings, tmp_path)
    while not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.05)
    assert "another run is going on in run_dir" in finish(settings, tmp_path, expect=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]

"""Whole runs in one process on a small real model."""

import errno
import fcntl
import io
import json
import math
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import models
import processes
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from mbdist.cli.main import app
from mbdist.config import parse_config
from mbdist.errors import UserError
from mbdist.train.metrics import MetricsWriter, read_metrics
from mbdist.train.run_folder import open_run_folder
from mbdist.train.status import describe_run
from mbdist.train.watch import RunWatcher
from mbdist_kernels import unpack_signs


def mbdist_train(settings, tmp_path, check=True):
    """The whole command."""
    path = tmp_path / f"{Path(settings['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = processes.mbdist("train", path).wait()
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def planes_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.data for name, p in model.named_parameters() if ".plane_" in name}, model


def finished_settings(run_dir, model):
    settings = models.run_settings(run_dir, model, sample_prompt="The", floats={"lr": 2e-2})
    settings["train"]["steps"] = 12
    settings["boolean"]["max_flip_rate"] = 2e-3
    return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama_folder):
    """A short run, finished; most tests below look at what it left."""
    folder = tmp_path_factory.mktemp("train")
    settings = finished_settings(folder / "run", llama_folder)
    done = mbdist_train(settings, folder)
    return folder / "run", done


@pytest.mark.slow
def test_summary_says_what_was_asked(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["planes"] == [2] and summary["world_size"] == 1 and summary["zero_stage"] == 2
    assert set(summary["perplexity"]) == {"float", "converted", "finetuned"}
    assert summary["planes_sha256"]["saved"] == summary["planes_sha256"]["reloaded"]
    assert summary["generated"].startswith("The") and len(summary["generated"]) > 3
    assert 2 < summary["bits_per_weight"] < 5 and summary["wall_s"] > 0


def moved_weights(before, after):
    """{layer: weights that any plane changed}, and the names of the planes that changed."""
    moved, planes = {}, set()
    for name, words in before.items():
        layer, plane = name.rsplit(".plane_", 1)
        differs = unpack_signs(words, 96) != unpack_signs(after[name], 96)
        moved[layer] = moved.get(layer, 0) | differs
        planes |= {plane} if differs.any() else set()
    return {layer: int(differs.sum()) for layer, differs in moved.items()}, planes


@pytest.mark.slow
def test_planes_move_by_what_the_log_says(finished):
    run_dir, _ = finished
    moved, planes = moved_weights(planes_of(run_dir / "converted")[0], planes_of(run_dir / "model")[0])
    assert planes == {"0", "1"}, "a move to the next level may flip any plane"
    flips = Counter()
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if record["event"] == "step":
            flips.update(record["flips"])
    assert sum(flips.values()) > 0, "the run must flip bits"
    for layer, count in moved.items():
        assert flips[layer] / 2 <= count <= flips[layer], "a weight may move twice, or back"


@pytest.mark.slow
def test_metrics_have_everything_a_user_watches(finished):
    records = [r for r in read_metrics(finished[0] / "metrics.jsonl") if r["event"] == "step"]
    assert [record["step"] for record in records] == list(range(1, 13))
    for key in ("loss", "kl", "learning_rate", "flip_rate", "flips", "tokens_per_s", "memory", "bytes_sent"):
        assert key in records[-1]
    assert {"planes", "accumulators", "teacher", "process"} <= set(records[-1]["memory"])
    assert all(record["flip_rate"] <= record["flip_cap"] for record in records)
    assert sum(record["kl"] for record in records[-3:]) / 3 < 0.9 * records[0]["kl"], "the student nears its teacher"
    assert (finished[0] / "config.yaml").exists()


@pytest.mark.slow
def test_the_same_run_gives_the_same_bits(finished, tmp_path, llama_folder):
    processes.train(finished_settings(tmp_path / "again", llama_folder))
    first, again = planes_of(finished[0] / "model")[0], planes_of(tmp_path / "again/model")[0]
    assert all(torch.equal(first[name], again[name]) for name in first)


VARIANTS = {
    "checkpointing": {"train": {"activation_checkpointing": True}},
    "in turns": {"boolean": {"turns": 2}},
    "no teacher": {"loss": {"teacher": "none"}},
    "hidden states": {"loss": {"hidden": "normalised", "kl_reduction": "batchmean"}},
    "probed": {"train": {"probe_every": 4}},
    "norms in bf16": {"floats": {"also_train": ["*norm*"]}, "train": {"precision": "bf16"}},
    "evidence": {"boolean": {"planes": "last", "signal": "evidence"}, "train": {"probe_every": 4}},
    "raw rule": {"boolean": {"planes": "last", "signal": "raw", "step_size": 3000.0}, "comm": {"codec": "bf16"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_flip_and_learn(finished, tmp_path, llama_folder, name):
    settings = finished_settings(tmp_path / "run", llama_folder)
    for section, values in VARIANTS[name].items():
        settings[section] = {**settings.get(section, {}), **values}
    processes.train(settings)
    steps = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["event"] == "step"]
    losses = [record["loss"] for record in steps]
    assert sum(losses[-3:]) / 3 < losses[0], losses
    assert sum(sum(record["flips"].values()) for record in steps) > 0
    before, after = planes_of(tmp_path / "run/converted")[1], planes_of(tmp_path / "run/model")[1]
    moved = not torch.equal(before.model.norm.weight, after.model.norm.weight)
    assert moved == (name == "norms in bf16")
    planes = moved_weights(planes_of(tmp_path / "run/converted")[0], planes_of(tmp_path / "run/model")[0])[1]
    assert planes == ({"1"} if settings["boolean"]["planes"] == "last" else {"0", "1"})
    if "probe_every" in settings["train"]:
        probes = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["event"] == "probe"]
        assert [probe["step"] for probe in probes] == [4, 8, 12]
        assert probes[0]["predicted_change"] < 0 and probes[0]["flips"] > 0
        assert math.isfinite(probes[0]["measured_change"]) and probes[0]["measured_change"] != 0
    if name in ("checkpointing", "probed"):
        expected = planes_of(finished[0] / "model")[0]
        assert all(torch.equal(words, expected[key]) for key, words in planes_of(tmp_path / "run/model")[0].items())


@pytest.mark.slow
def test_finetuning_goes_on_from_a_multi_boolean_model(finished, tmp_path, llama_folder):
    settings = models.run_settings(tmp_path / "run", finished[0] / "model", train={"steps": 2})
    refused = mbdist_train(settings, tmp_path, check=False)
    assert refused.returncode == 2 and "loss.teacher_model.path" in refused.stderr
    settings["loss"] = {"teacher_model": {"path": str(llama_folder)}}
    processes.train(settings)
    assert not (tmp_path / "run/converted").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"window": 256}}, "data.window = 256 is longer than the model's context of 128"),
        ({"model": {"path": "nowhere"}}, "cannot load the model nowhere"),
        ({"data": {"train": {"type": "text", "paths": ["none.txt"]}}}, "no file matches data path none.txt"),
        ({"train": {"sequences_per_step": 100_000, "micro_batch": 1}}, "less than the 100000 sequences of one step"),
        ({"train": {"sequences_per_step": 2**20, "micro_batch": 2**20}}, "too little memory: 1 worker(s) would take"),
        ({"floats": {"also_train": ["*nothing*"]}}, "no parameter matches"),
        ({"cluster": {"device": "cuda"}}, "torch sees no GPU"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(tmp_path, llama_folder, changes, message):
    settings = models.run_settings(tmp_path / "run", llama_folder)
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    done = mbdist_train(settings, tmp_path, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(tmp_path, llama_folder):
    settings = models.run_settings(tmp_path / "run", llama_folder, floats={"lr": 1e30})
    settings["train"] |= {"steps": 12, "max_skipped_steps": 2}
    done = mbdist_train(settings, tmp_path, check=False)
    assert done.returncode == 2 and "2 steps in a row had a loss or a signal that is not finite" in done.stderr
    steps = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["event"] == "step"]
    assert [step["skipped"] for step in steps[-2:]] == [True, True] and not steps[0]["skipped"]


def test_a_run_dir_that_cannot_be_written(tmp_path, llama_folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to run_dir"):
        open_run_folder(parse_config(models.run_settings(tmp_path / "file" / "run", llama_folder)))


def test_storage_without_locks_is_used_with_a_warning(tmp_path, llama_folder, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    open_run_folder(parse_config(models.run_settings(tmp_path / "run", llama_folder)))
    assert f"nobody is kept out of {tmp_path}/run, whose storage has no locks" in caplog.text
    MetricsWriter(tmp_path / "run/metrics.jsonl").write("tokenizing")
    assert "not running here" in describe_run(tmp_path / "run")


def test_a_watcher_and_the_status_tell_what_went_on(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    with RunWatcher(tmp_path / "metrics.jsonl", console):
        metrics.write("resumed", step=3, folder="step_3", changed={"cluster.workers": "2 -> 3"})
        metrics.write("workers_lost", workers=[1], error="worker 1 was lost: its node died")
        metrics.write("converted_layer", name="up_proj", done=5, layers=14)
    shown = console.file.getvalue()
    assert "  with cluster.workers: 2 -> 3\n" in shown and "WARNING: worker 1 was lost: its node died\n" in shown
    status = describe_run(tmp_path)
    assert "converting: 5 of 14 layers" in status and "worker 1 was lost: its node died" in status


def test_the_command_line_app_has_every_verb():
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    expected = {"convert", "train", "eval", "generate", "launch", "job", "status", "config", "env", "bench", "tune"}
    assert names == expected | {"plan", "teacher"}


def test_a_line_of_metrics_that_a_full_disk_cut_is_lost_alone(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        writer = MetricsWriter(tmp_path / "metrics.jsonl")
        writer.write("first")
        (tmp_path / "ballast").write_bytes(bytes(8192))
        writer.write("large", of=list(range(5000)))
        (tmp_path / "ballast").unlink()
        writer.write("last")
        assert [record["event"] for record in read_metrics(tmp_path / "metrics.jsonl")] == ["first", "last"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_signal_before_the_run_is_ready_is_remembered():
    script = (
        "import time; from mbdist.train import stop_signals as s; s.remember_preemption(); print('ready', flush=True); "
        "time.sleep(1); s.on_stop_signals(lambda: print('told'))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert process.communicate()[0] == "told\n" and process.returncode == 0

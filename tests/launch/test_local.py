"""Ray starts real DeepSpeed workers."""

import json
import signal
import subprocess
import time
from pathlib import Path

import models
import psutil
import pytest
import yaml

from mbdist.train.metrics import read_metrics


def launch(tmp_path, settings, check=True):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = ["mbdist", "launch", "local", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_workers_convert_train_and_save(tmp_path, llama_folder):
    settings = models.run_settings(tmp_path / "run", llama_folder, cluster={"workers": 2, "zero_stage": 2})
    settings["convert"]["init"] = "calibrated"
    settings["run_dir"] = "run"  # relative: means the same to Ray's workers as to the user
    done = launch(tmp_path, settings)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["zero_stage"] == 2
    assert summary["planes_sha256"]["saved"] == summary["planes_sha256"]["reloaded"]
    for text in ("2 worker(s) on cpu, ZeRO stage 2", "step 4/4", "loss", "tokens/s", "flips", "bit-identical"):
        assert text in done.stdout
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {"rank_0.log", "rank_1.log"}


@pytest.mark.slow
def test_a_users_mistake_in_a_worker_reaches_the_user(tmp_path, llama_folder):
    settings = models.run_settings(tmp_path / "run", llama_folder, cluster={"workers": 2}, data={"window": 4096})
    done = launch(tmp_path, settings, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: data.window = 4096 is longer than the model's context of 128 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_workers_than_sequences_is_found_before_anything_starts(tmp_path, llama_folder):
    settings = models.run_settings(tmp_path / "run", llama_folder, cluster={"workers": 50})
    done = launch(tmp_path, settings, check=False)
    assert done.returncode == 2 and "use at most 12 workers" in done.stderr
    assert not (tmp_path / "run").exists()


def with_checkpoints(tmp_path, llama_folder, name):
    return models.run_settings(
        tmp_path / name,
        llama_folder,
        cluster={"workers": 2, "zero_stage": 2},
        data={"max_eval_windows": 2},
        train={"steps": 12},
        floats={"lr": 1e-2},
        checkpoint={"every_steps": 2},
    )


def start_launch(tmp_path, settings):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = ["mbdist", "launch", "local", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)


def wait_for(event, run_dir, process):
    log = Path(run_dir) / "metrics.jsonl"
    while not (log.exists() and any(record["event"] == event for record in read_metrics(log))):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)


def train_workers(process):
    """Ray's processes that train, of this launch."""
    of_launch = psutil.Process(process.pid).children(recursive=True)
    return [child for child in of_launch if "TrainWorker" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_stopped_launch_goes_on(tmp_path, llama_folder):
    """Once by Ray, after SIGKILL; once by the user, after SIGTERM to the launcher. The bits are those of a run that
    nobody disturbed."""
    launch(tmp_path, with_checkpoints(tmp_path, llama_folder, "whole"))
    settings = with_checkpoints(tmp_path, llama_folder, "disturbed")
    process = start_launch(tmp_path, settings)
    wait_for("checkpoint", settings["run_dir"], process)
    workers = train_workers(process)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    wait_for("resumed", settings["run_dir"], process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on from there" in output, output[-3000:]
    done = launch(tmp_path, settings)
    assert "resumed after step" in done.stdout
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "disturbed")]
    assert summaries[0]["planes_sha256"] == summaries[1]["planes_sha256"]
    assert summaries[0]["perplexity"] == summaries[1]["perplexity"]


@pytest.mark.slow
def test_a_worker_that_hangs_is_found_and_replaced(tmp_path, llama_folder):
    """Stopped, not dead: its peer says what it waits for and ends, and Ray starts both again."""
    settings = with_checkpoints(tmp_path, llama_folder, "run")
    settings["train"] |= {"hang_timeout_s": 8, "steps": 30}
    process = start_launch(tmp_path, settings)
    wait_for("checkpoint", settings["run_dir"], process)
    train_workers(process)[1].send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "resumed after step" in output, output[-3000:]
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert "worker 0 hangs: for 8 s in" in log or "worker 0 hangs: for 9 s in" in log, log[-3000:]
    assert "What every thread of it is doing" in log and "trainer.py" in log


def test_a_launch_that_waits_for_room_can_be_stopped(tmp_path, llama_folder):
    settings = with_checkpoints(tmp_path, llama_folder, "run")
    settings["cluster"]["resources"] = {"unobtainium": 1}
    process = start_launch(tmp_path, settings)
    while not (tmp_path / "run/ray").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    time.sleep(3)  # Ray's own handler is replaced a moment later
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "stopped after step 0" in output, output[-3000:]

"""Ray starts real DeepSpeed workers."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import processes
import pytest
import yaml

from mbdist.train.metrics import read_metrics
from mbdist.train.status import describe_run


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
        cluster={"workers": 2, "zero_stage": 2, "cpus_per_worker": 1},
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


PHASES = ("forward", "all-to-all", "flip exchange", "saving", "backward")  # in the last it hangs


@pytest.mark.slow
def test_workers_that_are_killed_or_hang_in_any_phase_are_replaced(tmp_path, llama_folder):
    """The bits are those of a run that nobody disturbed. Of the hang, the peer says what it was doing."""
    processes.train(whole := with_checkpoints(tmp_path, llama_folder, "whole"))
    settings = with_checkpoints(tmp_path, llama_folder, "disturbed")
    settings["train"]["hang_timeout_s"] = 20
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (struck := tmp_path / "struck").mkdir()
    command = [sys.executable, Path(__file__).with_name("struck_workers.py"), tmp_path / "run.yaml", struck]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in struck.iterdir()) == sorted(PHASES)
    expected, found = (list(read_metrics(Path(each["run_dir"]) / "metrics.jsonl")) for each in (whole, settings))
    starts = [record for record in found if record["event"] == "start"]
    assert len(starts) == 1 + len(PHASES)
    lost = [record for record in found if record["event"] == "workers_lost"]
    assert len(lost) >= len(PHASES) and all("was lost: " in record["error"] for record in lost), lost
    assert lost[-1]["error"] in describe_run(tmp_path / "disturbed")
    assert found[-1]["event"] == "saved" and found[-1]["planes_sha256"] == expected[-1]["planes_sha256"]
    assert found[-2]["name"] == "finetuned" and found[-2]["perplexity"] == expected[-2]["perplexity"]
    assert not list((tmp_path / "disturbed/checkpoints").glob("*.tmp-*")), "what was half written is removed"
    log = (tmp_path / "disturbed/logs/rank_0.log").read_text()
    assert re.search(r"worker 0 hangs: for \d+ s in backward", log), log[-3000:]
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

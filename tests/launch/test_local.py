"""Ray starts real DeepSpeed workers."""

import json
import subprocess

import models
import pytest
import yaml


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

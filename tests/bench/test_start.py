"""Real ranks start a real run: none of them holds or reads more than its part of the model."""

import json
import subprocess
import sys

import models
import pytest
import yaml


def bench(tmp_path, model, *options):
    (config := tmp_path / "run.yaml").write_text(yaml.safe_dump(models.run_settings(tmp_path / "run", model)))
    command = [sys.executable, "-m", "mbdist.cli.main", "bench", "start", *options]
    command += ["--config", str(config), "--scratch", str(tmp_path), "--json", str(tmp_path / "start.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]  # it compares the peak itself
    return json.loads((tmp_path / "start.json").read_text())


@pytest.mark.slow
def test_ranks_hold_and_read_their_parts_alone(tmp_path, llama_folder):
    found = bench(tmp_path, llama_folder, "--shape", "300m", "--planes", "4")
    for rank in found["ranks"]:
        assert 0.45 < (rank["planes_bytes"] + rank["frozen_floats_bytes"]) / found["model_bytes"] < 0.55
        assert 0.45 < rank["read_bytes"] / found["model_bytes"] < 0.75, "libraries and messages too"


@pytest.mark.slow
def test_the_dense_baseline_takes_steps_too(tmp_path, llama_folder):
    found = bench(tmp_path, llama_folder, "--shape", "10m", "--dense", "--steps", "1")
    for rank in found["ranks"]:
        assert rank["linear_weights"] == 4 * (4 * 256 * 256 + 3 * 256 * 768)
        assert rank["step_s"] > 0 and rank["peak_of_a_step_bytes"] > 12 * rank["linear_weights"] / 2, "masters, moments"

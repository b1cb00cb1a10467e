"""Real ranks start a real run: none of them holds or reads more than its part of the model."""

import json
import subprocess
import sys

import models
import pytest
import yaml


@pytest.mark.slow
def test_ranks_hold_and_read_their_parts_alone(tmp_path, llama_folder):
    (config := tmp_path / "run.yaml").write_text(yaml.safe_dump(models.run_settings(tmp_path / "run", llama_folder)))
    command = [sys.executable, "-m", "mbdist.cli.main", "bench", "start", "--shape", "300m", "--planes", "4"]
    command += ["--config", str(config), "--scratch", str(tmp_path), "--json", str(tmp_path / "start.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]  # it compares the peak itself
    found = json.loads((tmp_path / "start.json").read_text())
    for rank in found["ranks"]:
        assert 0.45 < (rank["planes_bytes"] + rank["frozen_floats_bytes"]) / found["model_bytes"] < 0.55
        assert 0.45 < rank["read_bytes"] / found["model_bytes"] < 0.75, "libraries and messages too"

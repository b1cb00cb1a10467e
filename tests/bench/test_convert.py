"""``mbdist bench convert`` as a user runs it."""

import json

import models
import pytest
import yaml

from mbdist.cli import bench


@pytest.mark.slow
def test_memory_of_a_small_conversion(tmp_path, llama_folder, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(models.run_settings(tmp_path / "run", llama_folder)))
    changes = ["convert.calibration_tokens=2048"]
    bench.convert(
        changes, config=str(path), shape="10m", layers=2, planes=2, init="calibrated", json_file=tmp_path / "found.json"
    )
    found = json.loads((tmp_path / "found.json").read_text())
    weights = 2 * (4 * 256**2 + 3 * 256 * 768) + 2 * models.VOCABULARY * 256
    assert found["model_bytes"] == pytest.approx(2 * weights, rel=0.02)
    assert 2**20 < found["peak_bytes"] < 2**30 < found["before_bytes"] * 10 and found["seconds"] > 0
    assert "10m, 2 layer(s), K = 2, calibrated: at the most" in capsys.readouterr().out

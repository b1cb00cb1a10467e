"""Real runs, of a small model, with one setting changed."""

import json

import pytest
import torch

from mbdist.bench import levers
from mbdist.bench.levers import AS_CONFIGURED, LEVERS, Lever, bench_levers
from mbdist.config import load_config, with_changes
from mbdist.errors import ConfigError


def test_every_lever_is_a_valid_change():
    config = load_config("configs/levers.yaml", [])
    assert len({lever.name for lever in LEVERS}) == len(LEVERS) > 10
    for lever in LEVERS:
        assert with_changes(config, lever.changes) != config
        try:
            with_changes(config, {"cluster.device": "cpu", **lever.changes})
        except ConfigError:
            assert "offloaded" in lever.name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, to which memory can be offloaded")
def test_rows_are_of_real_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(levers, "_HIDDEN", 256)
    monkeypatch.setattr(levers, "_BLOCKS", 2)
    config = load_config("configs/levers.yaml", ["data.window=64", "train.steps=4", "cluster.workers=1"])
    no_teacher, offloaded = {"loss.teacher": "none"}, {"boolean.offload_accumulators": True}
    results = tmp_path / "levers.json"
    rows = bench_levers(config, results, [Lever("no teacher", no_teacher), Lever("offloaded", offloaded)])
    assert json.loads(results.read_text())["rows"] == rows
    assert [row["lever"] for row in rows] == [AS_CONFIGURED.name, "no teacher"], "a CPU has nowhere to offload to"
    assert rows[0]["peak_ratio"] == rows[0]["step_time_ratio"] == 1
    assert rows[1]["peak_mb"] < rows[0]["peak_mb"]

"""What the checkpoint bench makes of a run's log."""

import json

import pytest

from mbdist.bench import checkpoint as bench
from mbdist.config import load_config


@pytest.fixture
def a_run(monkeypatch, tmp_path):
    """The log of eight steps: two to warm up, then a machine that gets slower. The fourth and the seventh take a tenth
    longer than their neighbours, for within them a checkpoint is saved."""
    seconds = [9.0, 9.0, 1.0, 1.1, 1.0, 2.0, 2.2, 2.0]
    ends = [sum(seconds[: i + 1]) for i in range(len(seconds))]
    records = [{"event": "start", "trained_weights": {"a": 8, "b": 4}, "world_size": 2}]
    records += [
        {"event": "step", "step": i + 1, "seconds": s, "time": end}
        for i, (s, end) in enumerate(zip(seconds, ends, strict=True))
    ]
    for step in (4, 7):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "state").write_bytes(bytes(2_000_000))
        end = ends[step - 1] - 0.1
        records.append({"event": "checkpoint", "folder": str(folder), "time": end, "seconds": 0.5, "blocked_s": 0.25})
    monkeypatch.setattr(bench, "small_model", lambda source, *_: source)
    monkeypatch.setattr(bench, "start", lambda config: None)
    monkeypatch.setattr(bench, "finish", lambda *_: {})
    monkeypatch.setattr(bench, "records_of", lambda config: records)
    return records


def test_steps_in_which_was_saved_are_compared_with_their_neighbours(a_run, tmp_path):
    result = bench.bench_checkpoint(load_config("configs/checkpoint.yaml", []), tmp_path / "checkpoint.json")
    assert result["step_time_ratio"] == 1.1, "of neighbours; of all steps it would be 1.65"
    assert result["steps"] == {"while_saving": 2, "others": 4} and result["checkpoint_mb"] == 2.0
    assert (result["writing_s"], result["snapshot_s"], result["trained_weights"]) == (0.5, 0.25, 12)
    assert json.loads((tmp_path / "checkpoint.json").read_text()) == result


def test_a_checkpoint_that_lasts_into_the_next_step_counts_for_both(a_run, tmp_path):
    a_run[-2]["time"] += 0.2
    result = bench.bench_checkpoint(load_config("configs/checkpoint.yaml", []), None)
    assert result["steps"] == {"while_saving": 3, "others": 3}

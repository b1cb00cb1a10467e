"""What rank 0 does before the workers of a run compute together."""

import models
import pytest
import torch

from mbdist.config import parse_config
from mbdist.errors import Interrupted, UserError
from mbdist.model.hashing import hash_planes
from mbdist.model.loading import load_model
from mbdist.train import memory_check
from mbdist.train.memory_check import check_memory
from mbdist.train.metrics import MetricsWriter, read_metrics
from mbdist.train.prepare import prepare, student_source


def test_a_preparation_that_was_stopped_goes_on(tmp_path, llama_folder):
    hashes = []
    for name, stopped_after in (
        ("whole", None),
        ("stopped", 23),
    ):  # the text, then 7 matrices and their reports a block
        config = parse_config(models.run_settings(tmp_path / name, llama_folder))
        (tmp_path / name).mkdir()
        metrics, calls = MetricsWriter(tmp_path / name / "metrics.jsonl"), []

        def stop(calls=calls, stopped_after=stopped_after):
            calls.append(None)
            if len(calls) == stopped_after:
                raise Interrupted(0)

        times = {}
        if stopped_after:
            with pytest.raises(Interrupted):
                prepare(config, metrics, between=stop)
            partial = tmp_path / name / ".converted.partial"
            times = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
            assert len(times) == 3, "what is around the blocks, the first block, and the second, which was reported of"
        prepare(config, metrics, between=stop)
        folder = tmp_path / name / "converted"
        assert times.items() <= {file.name: file.stat().st_mtime_ns for file in folder.glob("*")}.items()
        hashes.append(hash_planes(load_model(student_source(config))))
    assert hashes[0] == hashes[1]


def test_too_little_memory_is_found_before_the_work(tmp_path, llama_folder, monkeypatch):
    """Two workers of about 120 MB each."""

    def check(free_mib, enforce=True):
        log = tmp_path / f"{free_mib}.jsonl"
        sections = {"data": {"window": 128}, "train": {"micro_batch": 6}, "cluster": {"workers": 2}}
        settings = models.run_settings(tmp_path / "run", llama_folder, **sections)
        monkeypatch.setattr(memory_check, "host_memory", lambda: free_mib << 20)
        check_memory(parse_config(settings), torch.device("cpu"), MetricsWriter(log).write, enforce)
        return [record["event"] for record in read_metrics(log)]

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = r"(?s)2 worker.s. would take 0\.2\d GiB .*activation_checkpointing=true.*check_memory=false"
    with pytest.raises(UserError, match=message):
        check(100)
    assert check(100, enforce=False) == ["memory_is_short"]
    assert check(250) == ["memory_is_short"] and check(1000) == []


def test_settings_that_changed_convert_anew(tmp_path, llama_folder):
    found = []
    for planes in (2, 3):
        config = parse_config(models.run_settings(tmp_path / "run", llama_folder, convert={"planes": planes}))
        (tmp_path / "run").mkdir(exist_ok=True)
        prepare(config, MetricsWriter(tmp_path / "run/metrics.jsonl"))
        found.append(load_model(student_source(config)).model.layers[0].mlp.up_proj.num_planes)
    assert found == [2, 3]


def test_a_calibration_stops_between_two_passes(tmp_path, llama_folder):
    convert = {"init": "calibrated", "calibration_tokens": 512, "reconstruction": {"steps": 2}}
    config = parse_config(models.run_settings(tmp_path / "run", llama_folder, convert=convert))
    (tmp_path / "run").mkdir()
    log = tmp_path / "run/metrics.jsonl"

    def stop():
        if "converting" in log.read_text():
            raise Interrupted(0)

    with pytest.raises(Interrupted):
        prepare(config, MetricsWriter(log), between=stop)
    assert list(read_metrics(log))[-1]["event"] == "converting", "before the first layer"
    prepare(config, MetricsWriter(log))
    layers = [record for record in read_metrics(log) if record["event"] == "converted_layer"]
    assert [record["done"] for record in layers] == list(range(1, 15)) and layers[-1]["layers"] == 14


def test_calibration_never_sees_what_is_held_out(tmp_path, llama_folder):
    """All of the training text, by default and named again; the whole of it under another name differs."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The value of name {n} is an object of type {n * n}. " for n in range(60)))
    again = tmp_path / "again.txt"
    again.write_text(text.read_text())
    sources = [{"type": "text", "paths": [str(path)]} for path in (text, text, again)]
    hashes = []
    for number, source in enumerate(sources):
        convert = {"init": "calibrated", "calibration_tokens": 10**6, "reconstruction": {"steps": 0}}
        convert["calibration"] = source if number else None
        data = {"train": sources[0]}
        config = parse_config(models.run_settings(tmp_path / f"run{number}", llama_folder, convert=convert, data=data))
        (tmp_path / f"run{number}").mkdir()
        prepare(config, MetricsWriter(tmp_path / f"run{number}/metrics.jsonl"))
        hashes.append(hash_planes(load_model(student_source(config))))
    assert hashes[0] == hashes[1] != hashes[2]

"""What rank 0 does before the workers of a run compute together."""

import models
import pytest

from mbdist.config import parse_config
from mbdist.errors import Interrupted
from mbdist.model.hashing import hash_planes
from mbdist.model.loading import load_model
from mbdist.train.metrics import MetricsWriter, read_metrics
from mbdist.train.prepare import prepare, student_source


def test_a_preparation_that_was_stopped_goes_on(tmp_path, llama_folder):
    hashes = []
    for name, stopped_after in (("whole", None), ("stopped", 9)):
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

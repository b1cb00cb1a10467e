"""The quality bench on a small model: real rows, kept between calls, a report at the end."""

import json

import models
import pytest

from mbdist.bench import quality, quality_rows
from mbdist.bench.quality import Row, bench_quality
from mbdist.bench.quality_report import write_report
from mbdist.config import load_config, parse_config


def small_groups():
    return {
        "start": lambda config: iter(
            [
                Row("start", "float", quality_rows.measure_float),
                *list(quality._architecture_rows(config))[1:3],  # a GPT-2, trained here, as run and reconstructed
                Row("start", "svid", quality_rows.measure_run, {"train.steps": 0, "convert.init": "svid"}),
                Row("start", "GPTQ, g16", quality_rows.measure_gptq, {}, (3, 16)),
            ]
        ),
        "finetuned": lambda _config: iter(
            [
                Row("finetuned", "float", quality_rows.measure_finetuned_float),
                Row("finetuned", "scales and bits", quality_rows.measure_run),
                Row("finetuned", "straight-through latents", quality_rows.measure_straight_through),
                Row("finetuned", "float", quality_rows.measure_finetuned_float, {"train.steps": 12}),
                Row("finetuned", "adapted, scales and bits", quality_rows.measure_adapted_run, {}, (6,)),
            ]
        ),
    }


@pytest.mark.slow
def test_rows_are_measured_once_and_reported(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setattr(quality, "GROUPS", small_groups())
    settings = models.run_settings(tmp_path / "work", llama_folder, convert={"init": "joint"}, floats={"lr": 1e-2})
    settings["train"]["steps"] = 6
    config, results = parse_config(settings), tmp_path / "quality.json"
    rows = bench_quality(config, ["start", "finetuned"], results)
    by_name = {(row["group"], row["name"]): row for row in reversed(rows)}
    assert len(rows) == 10 and json.loads(results.read_text()) == rows
    assert by_name["other architecture", "reconstructed"]["planes"] == 2
    assert by_name["start", "float"]["kl"] == pytest.approx(0, abs=1e-6)
    start, trained = by_name["start", "svid"], by_name["finetuned", "scales and bits"]
    assert trained["tokens"] == 6 * 12 * 32 and start["tokens"] == 0 and trained["step_s"] > 0
    assert trained["float_perplexity"] == by_name["finetuned", "float"]["perplexity"]
    assert start["float_perplexity"] == by_name["start", "float"]["perplexity"]
    latents = by_name["finetuned", "straight-through latents"]
    assert latents["state_bytes_per_weight"] - trained["state_bytes_per_weight"] > 9, "12 bytes against 1"
    adapted, longer = by_name["finetuned", "adapted, scales and bits"], rows[-2]
    assert adapted["tokens"] == longer["tokens"] == 2 * trained["tokens"]
    assert adapted["float_perplexity"] == longer["perplexity"]
    assert adapted["perplexity"] != trained["perplexity"], "of another float model"
    monkeypatch.setattr(quality, "in_own_process", None)  # a second measurement would fail
    assert bench_quality(config, ["start", "finetuned"], results) == rows
    write_report(results)
    assert "straight-through" in results.with_suffix(".md").read_text()
    assert "<svg" in results.with_suffix(".svg").read_text()


def test_every_row_is_a_valid_config():
    config = load_config("configs/quality.yaml", [])
    all_rows = [row for rows in quality.GROUPS.values() for row in rows(config)]
    names = [(row.group, row.name, str(row.changes), row.arguments) for row in all_rows]
    assert len(names) == len(set(names)) > 40
    for row in all_rows:
        quality.changed_config(config, row.changes)


@pytest.mark.parametrize(("group", "most"), [("finetuned", 250_000), ("adapted", 500_000), ("ablation", 100_000)])
def test_compared_rows_see_the_same_number_of_tokens(group, most):
    config = load_config("configs/quality.yaml", [])
    tokens = set()
    for row in quality.GROUPS[group](config):
        changed = quality.changed_config(config, row.changes)
        if row.measure is quality_rows.measure_finetuned_float:
            tokens.add(changed.train.steps * changed.tokens_per_step)
        else:
            before = row.arguments[0] * changed.tokens_per_step if row.name.startswith("adapted") else 0
            tokens.add(before + quality_rows._trained_tokens(changed))
    assert len(tokens) == 1 and max(tokens) <= most


def test_the_paper_row_is_the_paper_config():
    config, paper = load_config("configs/quality.yaml", []), load_config("configs/paper.yaml", [])
    row = next(row for row in quality.GROUPS["finetuned"](config) if row.name == "paper")
    changed = quality.changed_config(config, row.changes)
    assert (paper.boolean, paper.floats, paper.loss) == (changed.boolean, changed.floats, changed.loss)
    assert paper.convert.init == changed.convert.init and changed.convert.planes == 2


def test_a_row_is_measured_again_where_what_it_depends_on_changes():
    config = load_config("configs/quality.yaml", [])
    floats = load_config("configs/quality.yaml", ["floats.lr=0.5"])
    reconstruction = load_config("configs/quality.yaml", ["convert.reconstruction.steps=7"])
    rows = {(row.name, str(row.changes)): row for row in quality.GROUPS["start"](config)}
    trained = next(row for row in quality.GROUPS["finetuned"](config) if row.name == "scales and bits")
    for (name, _), row in rows.items():
        keys = [row.depends_on(quality.changed_config(c, row.changes)) for c in (config, floats, reconstruction)]
        assert keys[0] == keys[1], "nothing is trained"
        assert (keys[0] == keys[2]) == (name in ("float", "calibrated")), name
    keys = [trained.depends_on(quality.changed_config(c, trained.changes)) for c in (config, floats)]
    assert keys[0] != keys[1]

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mbdist.config import RunConfig, load_config, parse_config, write_config
from mbdist.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": {"type": "python_docs"}}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_all_errors_are_reported_at_once_with_path_value_and_hint():
    settings = {
        **MINIMAL,
        "train": {"stpes": 3, "micro_batch": 0},
        "cluster": {"workers": "many"},
        "boolean": {"signal": "none"},
    }
    settings["data"] = {"train": {"type": "python_docs", "paths": ["x"]}}
    del settings["run_dir"]
    with pytest.raises(ConfigError) as raised:
        parse_config(settings)
    message = str(raised.value)
    for part in (
        "6 problem(s)",
        "run_dir: missing",
        "train.stpes: unknown setting; did you mean steps?",
        "train.micro_batch: input should be greater than 0, got 0",
        "cluster.workers: input should be a valid integer",
        "'many'",
        "boolean.signal: input should be 'curvature', 'evidence', 'rms' or 'raw', got 'none'",
        "data.train.paths: unknown setting; allowed here: type",
    ):
        assert part in message


def test_overrides_replace_values_and_keep_types(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["train.steps=7", "floats.lr=1e-3", "convert.include=[a, b]", "data.cache_dir=/x"])
    assert config.train.steps == 7 and config.floats.lr == 1e-3
    assert config.convert.include == ["a", "b"] and config.data.cache_dir == "/x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "must read key.sub=value"),
        ("=3", "must read key.sub=value"),
        ("train.steps.more=3", "did you mean|valid"),
        ("run_dir.x=3", "is a value, not a section"),
        ("train.steps=[", "not valid YAML"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("run_dir: a\nrun_dir: b\n", "key given twice: run_dir"),
        ("", "must hold a mapping"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "accumulation"), [(8, 4, 2, 1), (8, 1, 2, 4), (12, 2, 3, 2), (1, 1, 1, 1)]
)
def test_accumulation_follows_from_the_batch(batch, micro, workers, accumulation):
    settings = {
        **MINIMAL,
        "train": {"sequences_per_step": batch, "micro_batch": micro},
        "cluster": {"workers": workers},
    }
    assert parse_config(settings).accumulation == accumulation


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "fix"),
    [
        (8, 3, 2, "train.micro_batch can be 1, 2, 4 here"),
        (8, 4, 3, "train.sequences_per_step must be a multiple of 3"),
        (2, 1, 4, "use at most 2 workers"),
    ],
)
def test_an_impossible_batch_names_the_fix(batch, micro, workers, fix):
    settings = {
        **MINIMAL,
        "train": {"sequences_per_step": batch, "micro_batch": micro},
        "cluster": {"workers": workers},
    }
    with pytest.raises(ConfigError, match=fix):
        parse_config(settings)


@pytest.mark.parametrize("setting", [{"resident_planes": "frozen"}, {"resident_floats": "frozen"}])
def test_resident_state_is_for_stage_3(setting):
    with pytest.raises(ConfigError, match=r"is for cluster.zero_stage = 3: at stage 2"):
        parse_config({**MINIMAL, "comm": setting})
    parse_config({**MINIMAL, "comm": setting, "cluster": {"zero_stage": 3}})


def test_contradictions_in_the_loss():
    with pytest.raises(ConfigError, match="needs a teacher"):
        parse_config({**MINIMAL, "loss": {"teacher": "none", "hidden": "mse"}})
    with pytest.raises(ConfigError, match="every weight is 0"):
        parse_config({**MINIMAL, "loss": {"kl_weight": 0}})


def test_the_deepspeed_config_follows_from_the_batch():
    from mbdist.engine.deepspeed_config import deepspeed_config

    settings = {
        **MINIMAL,
        "train": {"sequences_per_step": 24, "micro_batch": 2, "max_grad_norm": 0.5},
        "cluster": {"workers": 3, "zero_stage": 3},
    }
    generated = deepspeed_config(parse_config(settings))
    assert generated["train_batch_size"] == 24
    assert generated["train_micro_batch_size_per_gpu"] * generated["gradient_accumulation_steps"] * 3 == 24
    assert generated["zero_optimization"]["stage"] == 3 and generated["gradient_clipping"] == 0.5


def test_every_setting_is_documented():
    schema = RunConfig.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    undocumented = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not field.get("description")
    ]
    assert undocumented == []
    json.dumps(schema)


def test_config_imports_no_heavy_library():
    heavy = "('torch', 'deepspeed', 'ray', 'transformers')"
    code = f"import sys, mbdist.config; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_machines_that_do_not_divide_the_workers_are_refused():
    sections = {"train": {"sequences_per_step": 8, "micro_batch": 1}, "cluster": {"workers": 4}}
    with pytest.raises(ConfigError, match="cannot be cut into machines of 3 workers"):
        parse_config({**MINIMAL, **sections, "comm": {"node_size": 3}})
    for fits in (2, 8, "auto", None):
        assert parse_config({**MINIMAL, **sections, "comm": {"node_size": fits}}).comm.node_size == fits
    with pytest.raises(ConfigError, match=r"comm\.node_size"):
        parse_config({**MINIMAL, **sections, "comm": {"node_size": "some"}})


def test_zero_3_gathers_one_block_ahead_and_keeps_for_backward_what_has_room():
    from torch import nn

    from mbdist.engine.deepspeed_config import deepspeed_config

    model = list(
        nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(100, 10, bias=False) for _ in range(3))}).named_parameters()
    )
    for _, parameter in model:
        parameter.requires_grad_(False)

    def zero(gb: float) -> dict:
        comm = {"keep_gathered_gb": gb}
        config = parse_config({**MINIMAL, "cluster": {"zero_stage": 3}, "comm": comm})
        assert "stage3_prefetch_bucket_size" not in deepspeed_config(config)["zero_optimization"]
        return deepspeed_config(config, model)["zero_optimization"]

    room = 4 * 3000 / 2**30
    assert zero(room)["stage3_prefetch_bucket_size"] == zero(0)["stage3_prefetch_bucket_size"] == 1000
    assert zero(room)["stage3_max_reuse_distance"] > 2**60
    assert zero(room - 1e-9)["stage3_max_reuse_distance"] == zero(0)["stage3_max_reuse_distance"] == 1000


@pytest.mark.parametrize(("planes", "message"), [([1, 1], "names a plane twice"), ([-1], "boolean.planes")])
def test_planes_that_cannot_be_named_so_are_refused(planes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, "boolean": {"planes": planes}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"boolean": {"turns": 2, "planes": "alternating"}}, "set boolean.turns to 1"),
        ({"boolean": {"offload_accumulators": True}}, "boolean.offload_accumulators is for GPU workers"),
        (
            {"train": {"offload_activations": True, "activation_checkpointing": True}},
            "train.offload_activations is for GPU workers",
        ),
        ({"train": {"offload_activations": True}}, "set that to true too"),
    ],
)
def test_levers_that_would_do_nothing_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(MINIMAL | {"cluster": {"device": "cpu"}} | sections)


@pytest.mark.parametrize("path", [path for path in CONFIGS if "70b" in path.name], ids=lambda path: path.stem)
def test_commands_in_the_header_are_ones_that_exist(path):
    from typer.main import get_command

    from mbdist.cli.main import app

    lines = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert len(lines) == 4
    for line in lines:
        arguments, command = shlex.split(line.partition("mbdist ")[2]), get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        given = command.make_context("mbdist", arguments).params
        if "run" in given:
            load_config(CONFIGS[0].parents[1] / given["run"], given["overrides"] or [])


def test_every_key_of_the_70b_configs_is_documented():
    for path in (path for path in CONFIGS if "70b" in path.name):
        keys = [line for line in path.read_text().splitlines() if re.match(r" *\w+: ", line)]
        assert len(keys) > 30 and all(re.search(r" # \w", line) for line in keys), path.name

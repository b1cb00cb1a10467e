"""``mbdist plan`` as a user runs it."""

import json
import re
from pathlib import Path

import pytest
import torch

from mbdist.config import load_config, parse_config
from mbdist.errors import UserError
from mbdist.plan import command, plan_memory, planned_model
from mbdist.plan.advice import advice
from mbdist.plan.command import plan_command
from mbdist.plan.hardware import GPUS, link_rate
from mbdist.plan.rates import Measured
from mbdist.plan.step_time import plan_step, trained_model

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = f"model.path={CONFIGS / 'shapes/llama2-70b'}"
GIB = 2**30
CPU_RATES = CONFIGS.parent / "docs/benchmarks/kernels_cpu.json"


def plan_70b(capsys, *changes, gpu="h100-80g", nodes=2, name="llama2_70b_ray.yaml"):
    fits = plan_command(load_config(str(CONFIGS / name), [SHAPE, *changes]), gpu, nodes, "400gbit", dry_run=False)
    return fits, capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama2_70b_ray.yaml", "llama2_70b_slurm.yaml"])
def test_70b_configs_fit_two_machines(capsys, name):
    fits, printed = plan_70b(capsys, name=name)
    assert fits and "68.45 G weights in 560 matrices" in printed and "It fits" in printed


def test_70b_on_one_gpu_of_141_gb(capsys):
    one = ["cluster.workers=1", "cluster.zero_stage=2", "train.micro_batch=1", "comm.node_size=null"]
    one += ["comm.resident_planes=none", "comm.resident_floats=none"]
    assert plan_70b(capsys, *one, gpu="h200-141g", nodes=1)[0]
    fits, printed = plan_70b(capsys, *one, "boolean.signal=curvature", "boolean.step_size=0.05", nodes=1)
    assert not fits and "boolean.accumulator=int4" in printed


def test_what_does_not_fit_comes_with_changes_that_make_it_fit(capsys):
    fits, printed = plan_70b(capsys, "train.activation_checkpointing=false", "train.micro_batch=4")
    assert not fits and "does NOT fit" in printed
    assert "train.activation_checkpointing=true" in printed and "not enough" not in printed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """12 blocks, 1024 wide, whose plans take a moment."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    shape = json.loads((CONFIGS / "shapes/llama2-70b/config.json").read_text()) | sizes | heads
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(shape))
    return [f"model.path={folder}", "cluster.workers=4", "comm.node_size=null", "data.window=256"]


ALONE = ["cluster.workers=1", "cluster.zero_stage=2", "comm.resident_planes=none", "comm.resident_floats=none"]
SMALLER = ["train.micro_batch=1", "loss.chunk_tokens=128"]
NOTHING_RESIDENT = ["comm.keep_gathered_gb=0", "comm.resident_floats=none", "comm.resident_planes=none"]
INT4 = "boolean.accumulator=int4 boolean.signal=curvature boolean.step_size=0.05"
SHARDED = "loss.teacher_placement=sharded"


@pytest.mark.parametrize(
    ("device", "changes", "advised"),
    [
        ("cpu", ["loss.teacher=float"], [*SMALLER, SHARDED, "loss.teacher=cached", *NOTHING_RESIDENT, INT4]),
        ("cpu", ["loss.teacher=float", "loss.hidden=mse"], [*SMALLER, SHARDED, *NOTHING_RESIDENT, INT4]),
        (
            "cpu",
            ["train.activation_checkpointing=false", "boolean.signal=rms"],
            ["train.activation_checkpointing=true", *SMALLER, *NOTHING_RESIDENT, "boolean.accumulator=int4"],
        ),
        ("cuda", ALONE, [*SMALLER, INT4, "boolean.offload_accumulators=true"]),
        ("cuda", [*ALONE, "cluster.device=cpu"], [*SMALLER, INT4]),
        (
            "cuda",  # so few tokens that checkpoints save nothing, and cannot be offloaded then
            [*ALONE, "train.activation_checkpointing=false", "train.micro_batch=1", "data.window=8"],
            [INT4, "boolean.offload_accumulators=true"],
        ),
    ],
)
def test_advice_is_what_helps_and_what_the_config_admits(small, device, changes, advised):
    config = load_config(str(CONFIGS / "llama2_70b_ray.yaml"), [*small, *changes])
    workers, planned = config.cluster.most_workers, planned_model(config)
    plan = plan_memory(planned, workers, torch.bfloat16, device)
    found = advice(planned, plan, workers, torch.bfloat16, device, lambda _plan: False)
    assert [each.setting for each in found] == advised
    sizes = [plan.total, *(each.memory.total for each in found)]
    assert sizes == sorted(sizes, reverse=True)


def test_of_a_range_of_workers_the_fullest_is_planned(capsys, small):
    """One worker alone holds all planes; machines of four workers, as eight have, are no setting of it."""
    workers = ["cluster.workers={min: 1, max: 8}", "train.micro_batch=1", "train.sequences_per_step=840"]
    assert "1 worker(s) on 1 machine(s)" in plan_70b(capsys, *small, *workers, nodes=2)[1]


def test_activations_are_shown_with_and_without_checkpointing(capsys, small):
    (line,) = (line for line in plan_70b(capsys, *small)[1].splitlines() if line.startswith("activations: "))
    found = re.fullmatch(
        r"activations: ([\d.]+) GiB with activation checkpointing \(([\d.]+) in all\), "
        r"([\d.]+) GiB without activation checkpointing \(([\d.]+) in all\)",
        line,
    )
    with_it, in_all, without, all_without = map(float, found.groups())
    assert without > 5 * with_it and all_without > in_all + 0.2


def test_a_plan_for_cpus_says_whether_they_fit_here(capsys, llama_folder, tmp_path, monkeypatch):
    run = {"run_dir": str(tmp_path), "model": {"path": str(llama_folder)}, "cluster": {"workers": 2, "device": "cpu"}}
    run |= {"data": {"train": {"type": "python_docs"}, "window": 32}, "train": {"micro_batch": 4}}
    monkeypatch.setattr(command, "host_memory", lambda: 4 * GIB)
    file, rates = tmp_path / "plan.json", rates_file(tmp_path / "rates.json", **OPERATIONS)
    assert plan_command(parse_config(run), "cpu", 1, "400gbit", dry_run=True, rates_file=rates, json_file=file)
    found = json.loads(file.read_text())
    assert found["fits"] and found["workers"] == 2 and found["memory"]["in all"] > found["memory"]["teacher"] > 0
    rows = {row["what"]: row for row in found["dry_run"]}
    assert (
        rows["sent: signal"]["found"] == rows["sent: signal"]["planned"] > 0 and rows["buckets: signal"]["found"] == 1
    )
    assert found["step"]["sent"]["signal"] == rows["sent: signal"]["planned"], "one micro-batch"
    assert "It fits: this machine has 4.0 GiB free, and 2 worker(s) take 1." in capsys.readouterr().out
    monkeypatch.setattr(command, "host_memory", lambda: 1 * GIB)
    assert not plan_command(parse_config(run), "cpu", 1, "400gbit", dry_run=False)
    assert "not enough by themselves" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [16, 1024])
def test_what_is_partitioned_shrinks_with_the_workers(workers):
    config = load_config(
        str(CONFIGS / "llama2_70b_ray.yaml"),
        [SHAPE, f"cluster.workers={workers}", f"train.sequences_per_step={2 * workers}", "comm.resident_planes=none"],
    )
    kept = plan_memory(planned_model(config), workers, torch.bfloat16, "cuda").kept
    assert kept["planes"] == pytest.approx(2 * 68.45e9 / 8 / workers, rel=0.01)
    assert kept["accumulators"] == pytest.approx(68.45e9 / workers, rel=0.01)


def test_a_teacher_counts_by_what_of_it_is_in_memory(llama_folder, tmp_path):
    def teacher(**loss):
        run = {"run_dir": str(tmp_path), "model": {"path": str(llama_folder)}, "loss": loss}
        run |= {"data": {"train": {"type": "python_docs"}, "window": 32}, "cluster": {"workers": 2}}
        return plan_memory(planned_model(parse_config(run)), 2, torch.bfloat16, "cpu").kept["teacher"]

    weights = 512 * 72 + 2 * (2 * 72 * 72 + 2 * 36 * 72 + 3 * 72 * 80 + 2 * 72) + 72
    assert teacher() == 2 * weights
    assert teacher(teacher="none") == teacher(teacher="cached") == 0
    assert teacher(teacher_placement="sharded") < 2 * teacher(), "a part, and what is gathered at a time"


OPERATIONS = {
    **dict.fromkeys(("linear, forward", "linear, dX", "linear, dW to signs and scales"), 100.0),
    "flip_update, int8": 1000.0,
}


def rates_file(path, device="cpu", **us):
    """One row an operation, of a 64 x 64 matrix and 256 tokens."""
    shape = {"shape": "64x64", "planes": 2}
    rows = [
        {"op": op, **shape, "batch": 0 if "flip" in op else 256, "us": each, "baseline_us": each / 2}
        for op, each in us.items()
    ]
    path.write_text(json.dumps({"device": device, "torch": "2", "copy_gb_s": 1.0, "rows": rows}))
    return path


def test_seconds_come_from_measured_rows(capsys, small, tmp_path):
    """100 us a product of 64 x 64 with 256 tokens, the dense one 50; the head and attention count as dense. Two
    workers share a machine's cores."""
    file = rates_file(tmp_path / "rates.json", **OPERATIONS)
    config = load_config(str(CONFIGS / "llama2_70b_ray.yaml"), [*small, "cluster.device=cpu"])
    planned = planned_model(config)
    step = plan_step(planned, trained_model(planned, torch.bfloat16), 4, 2, Measured(file, sharing=2), 1e9, 1e9)
    weights, head = 12 * (1024 * (2 * 1024 + 2 * 256 + 3 * 2816)), 1024 * 32000
    attention = 12 * 1024 * 256  # multiplications a token and forward pass, half of all pairs; backward takes twice
    products = 100e-6 * (4 * weights + 0.5 * (3 * head + 4 * attention)) / 64**2 * (2 * 256) / 256
    assert step.compute_s == pytest.approx(2 * 8 * (products + 1000e-6 * weights / 64**2), rel=1e-3)
    plan_command(config, "cpu", 2, "10gbit", dry_run=False, rates_file=file)
    printed = capsys.readouterr().out
    assert f"{step.compute_s:.3g} s of computing" in printed and "rates.json, measured on cpu" in printed


def test_the_nearest_row_is_taken():
    """Of one to three planes, 1 to 8,192 tokens and seven shapes, among them 5120 x 5120 and 8192 x 8192."""
    measured, rows = Measured(CPU_RATES), json.loads(CPU_RATES.read_text())["rows"]
    wanted = {"op": "linear, forward", "shape": "13824x5120", "planes": 2, "batch": 512}
    (nearest,) = (row["us"] * 1e-6 for row in rows if wanted.items() <= row.items())
    scaled = nearest * 11008 * 4096 * 1024 / (13824 * 5120 * 512)
    assert measured.product("forward", (11008, 4096), 2, 1024) == pytest.approx(scaled, rel=1e-3)
    assert measured.product("dense", (11008, 4096), 2, 1024) < measured.product("forward", (11008, 4096), 2, 1024)


def test_flips_are_of_another_accumulator_where_theirs_were_not_measured(tmp_path):
    both = {"flip_update, int8": 10.0, "flip_update, int4": 20.0}
    measured = Measured(rates_file(tmp_path / "rates.json", **both))
    found = [measured.flips((128, 64), accumulator) for accumulator in ("int8", "int4", "fp32")]
    assert found == pytest.approx([20e-6, 40e-6, 40e-6])


def test_rates_that_cannot_serve_are_refused(capsys, small, tmp_path):
    (tmp_path / "text.json").write_text("[]")
    for rates, gpu, message in (
        (tmp_path / "none.json", "cpu", "cannot be read"),
        (tmp_path / "text.json", "cpu", "is not what mbdist bench kernels"),
        (CPU_RATES, "h100-80g", "and the plan is for --gpu h100-80g"),
        (rates_file(tmp_path / "few.json", **{"linear, forward": 1.0}), "cpu", "has no row of 'linear, dX'"),
    ):
        config = load_config(str(CONFIGS / "llama2_70b_ray.yaml"), small)
        with pytest.raises(UserError, match=message):
            plan_command(config, gpu, 2, "10gbit", dry_run=False, rates_file=rates)


def test_bad_arguments_name_what_is_allowed(capsys):
    with pytest.raises(UserError, match="h200-141g"):
        plan_70b(capsys, gpu="h300")
    with pytest.raises(UserError, match="400gbit"):
        link_rate("fast")
    with pytest.raises(UserError, match="cannot be shared by --nodes 3"):
        plan_70b(capsys, nodes=3)


def test_link_rates():
    assert link_rate("400gbit") == 50e9 and link_rate("100 Mbit/s") == 12.5e6
    assert GPUS["h100-80g"].usable_bytes < 80 * GIB


def test_shape_of_llama2_70b():
    shape = json.loads((CONFIGS / "shapes/llama2-70b/config.json").read_text())
    assert (shape["num_hidden_layers"], shape["num_key_value_heads"], shape["vocab_size"]) == (80, 8, 32000)

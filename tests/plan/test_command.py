"""``mbdist plan`` as a user runs it."""

import json
from pathlib import Path

import pytest
import torch

from mbdist.config import load_config, parse_config
from mbdist.errors import UserError
from mbdist.plan import plan_memory, planned_model
from mbdist.plan.command import plan_command
from mbdist.plan.hardware import GPUS, link_rate

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = f"model.path={CONFIGS / 'shapes/llama2-70b'}"
GIB = 2**30


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

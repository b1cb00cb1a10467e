"""Real DeepSpeed on real processes: the planes do not depend on how the run is sharded."""

from pathlib import Path

import models
import processes
import pytest
import torch

from mbdist.comm.step_bytes import step_bytes
from mbdist.config import parse_config
from mbdist.model.hashing import hash_planes
from mbdist.model.loading import ModelConfig, load_model
from mbdist.plan import planned_model
from mbdist.plan.step_time import trained_model
from mbdist.train.metrics import read_metrics
from mbdist_kernels import words_per_row

BUCKETS_MB = (25, 1e-6)  # all of the model in one; a matrix each
CASES = [  # beside one worker and stage 0, what they are compared with
    (workers, stage, BUCKETS_MB[(workers + stage) % 2])
    for workers, stages in {1: (3,), 2: (0, 1, 2, 3), 3: (2, 3), 4: (1, 3)}.items()
    for stage in stages
]


def train(tmp_path, model, workers, stage, lr=0.0, sections=None, **train_section):
    """(digest of the planes, flips by step, step records).

    The sum of the scales' gradients over ranks is DeepSpeed's, in floats, and its order depends on the ranks: with the
    scales at rest (lr 0), everything that decides a flip is reduced in a fixed order.
    """
    run_dir = tmp_path / f"{workers}x{stage}"
    processes.train(settings(run_dir, model, workers, stage, lr, sections, **train_section))
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == "step"]
    flips = [record["flips"] for record in steps]
    return hash_planes(load_model(ModelConfig(path=str(run_dir / "model")))), flips, steps


def settings(run_dir, model, workers, stage, lr=0.0, sections=None, **train_section):
    sections = dict(sections or {})
    return models.run_settings(
        run_dir,
        model,
        cluster={"workers": workers, "zero_stage": stage, "cpus_per_worker": 1},
        floats={"lr": lr, **sections.pop("floats", {})},
        data={"max_eval_windows": 2, **sections.pop("data", {})},
        **sections,
        train=train_section,
    )


def check_bytes_on_paper(steps, *run, **changes):
    """The counted bytes of a real run's last steps, as many as matrices take turns, against those that are planned,
    which are returned. ``run`` and ``changes`` as for ``settings``, from the model on."""
    config = parse_config(settings(Path("unused/run"), *run, **changes))
    workers, turns = config.cluster.workers, config.boolean.turns
    model = trained_model(planned_model(config), torch.float32)
    planned = step_bytes(model, workers, config.cluster.zero_stage, config.comm, config.accumulation)
    sent = [step["bytes_sent"] for step in steps[-turns:]]
    for phase in ("signal", "signal_in_node"):
        assert sum(of_step.get(phase, 0) for of_step in sent) == turns * planned.get(phase, 0), phase
    scatters = 2 if config.cluster.zero_stage == 3 else 1  # gloo's scatter sends as much as an all-reduce
    for of_step in sent:
        assert of_step["statistics"] == pytest.approx(planned["statistics"], rel=0.02)
        assert of_step["float gradients"] == pytest.approx(scatters * planned["float gradients"], abs=64), "and norms"
        assert of_step.get("planes", 0) == planned.get("planes", 0)
        assert of_step["floats"] == pytest.approx(planned["floats"] + planned.get("frozen floats", 0), rel=0.01)
    return planned


@pytest.fixture(scope="module")
def alone(tmp_path_factory, llama_folder):
    return train(tmp_path_factory.mktemp("alone"), llama_folder, 1, 0, micro_batch=1)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage", "bucket_mb"), CASES)
def test_same_planes_for_any_workers_stage_and_buckets(tmp_path, llama_folder, alone, workers, stage, bucket_mb):
    comm = {"bucket_mb": bucket_mb}
    digest, flips, steps = train(tmp_path, llama_folder, workers, stage, sections={"comm": comm}, micro_batch=1)
    assert sum(sum(step.values()) for step in alone[1]) > 100, "the run must flip bits"
    assert flips == alone[1]
    assert digest == alone[0]
    memory, whole = steps[-1]["memory"], alone[2][-1]["memory"]
    assert memory["accumulators"] <= whole["accumulators"] / workers * 1.05 + 4096, "accumulators are partitioned"
    if stage == 3:
        assert memory["planes"] <= whole["planes"] / workers * 1.05 + 4096, "planes are partitioned"
        assert "flips" not in steps[-1]["bytes_sent"], "under ZeRO-3 a flip costs no message"


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_other_codecs_than_signs_give_the_same_planes_too(tmp_path, llama_folder, codec):
    """Row scales and buckets cross the cuts of the matrices; the smallest buckets hold one matrix each."""
    digest, flips, _ = train(tmp_path, llama_folder, 1, 0, sections={"comm": {"codec": codec}})
    assert sum(sum(step.values()) for step in flips) > 100
    for workers, stage, bucket_mb in ((2, 2, 25), (3, 3, 1e-6)):
        comm = {"codec": codec, "bucket_mb": bucket_mb}
        assert train(tmp_path, llama_folder, workers, stage, sections={"comm": comm})[:2] == (digest, flips)


@pytest.mark.slow
def test_nodes_send_one_message_and_stages_agree(tmp_path, llama_folder):
    """The bits depend on the nodes, not on the stage; copies stay equal (``check_planes_every``)."""
    sections = {"comm": {"codec": "sign", "node_size": 2}}
    digest, flips, steps = train(tmp_path, llama_folder, 4, 2, sections=sections, micro_batch=1)
    assert sum(sum(step.values()) for step in flips) > 100
    sent = steps[-1]["bytes_sent"]
    assert sent["signal_in_node"] > 10 * sent["signal"] > 0
    check_bytes_on_paper(steps, llama_folder, 4, 2, sections=sections, micro_batch=1)
    assert train(tmp_path, llama_folder, 4, 3, sections=sections, micro_batch=1)[:2] == (digest, flips)


@pytest.mark.slow
def test_resident_planes_change_nothing_but_traffic(tmp_path, llama_folder):
    """Of two planes the last trains: the other may stay whole for nothing, the last at the price of sending flips.
    What a forward pass gathered may be used by the backward pass too, evaluations before and after it or not."""
    cases = {
        "none": {"resident_planes": "none"},
        "twice": {"resident_planes": "none", "keep_gathered_gb": 0.0},
        "frozen": {"resident_planes": "frozen"},
        "all": {"resident_planes": "all"},
        "floats": {"resident_planes": "all", "resident_floats": "frozen"},
    }
    found, sent = {}, {}
    for name, comm in cases.items():
        (folder := tmp_path / name).mkdir()
        sections = {"comm": comm, "boolean": {"planes": "last"}}
        *found[name], steps = train(folder, llama_folder, 2, 3, sections=sections, eval_every=2)
        sent[name] = steps[-1]["bytes_sent"]
        check_bytes_on_paper(steps, llama_folder, 2, 3, sections=sections)
        assert found[name] == found["none"], name
    assert sum(sum(step.values()) for step in found["none"][1]) > 100
    planes = {name: of_step.get("planes", 0) for name, of_step in sent.items()}
    assert planes["twice"] == 2 * planes["none"] == 4 * planes["frozen"] > 0, "two planes, or one"
    assert planes["all"] == planes["floats"] == 0
    assert sent["twice"]["floats"] > sent["none"]["floats"] and sent["all"]["floats"] > sent["floats"]["floats"]
    assert "flips" not in sent["none"] and "flips" not in sent["frozen"] and sent["all"]["flips"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("resident_floats", ["none", "frozen"])
def test_what_evaluations_gather_ahead_is_not_in_the_way_of_saving(tmp_path, resident_floats):
    """Of many batches, by ranks that keep nothing for backward: the last ones gather blocks ahead for it."""
    comm = {"keep_gathered_gb": 0.0, "resident_floats": resident_floats}
    sections = {"comm": comm, "data": {"max_eval_windows": 8}}
    model = models.save_small_model(tmp_path / "deep", layers=8)
    _, flips, steps = train(tmp_path, model, 2, 3, sections=sections, eval_every=2, eval_batch=1)
    assert sum(sum(step.values()) for step in flips) > 100 and len(steps) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("boolean", "resident"),
    [({"planes": "all"}, 0), ({"planes": [0]}, 1), ({"planes": "levels"}, 0), ({"planes": "last", "turns": 2}, 1)],
)
def test_plans_know_which_planes_train_and_when(tmp_path, llama_folder, boolean, resident):
    """Of two planes ``resident`` stay whole as ``frozen``; the bytes of a run's last steps are those on paper."""
    sections = {"boolean": boolean, "comm": {"resident_planes": "frozen"}}
    _, flips, steps = train(tmp_path, llama_folder, 2, 3, sections=sections)
    assert sum(sum(step.values()) for step in flips) > 100
    planned = check_bytes_on_paper(steps, llama_folder, 2, 3, sections=sections)["planes"]
    linear = [module.weight for name, module in models.small_model().named_modules() if "_proj" in name]
    plane = sum(4 * len(weight) * words_per_row(weight.shape[1]) for weight in linear)
    kept = plane * (resident + (2 - resident) / 2)
    assert steps[-1]["memory"]["planes"] == pytest.approx(kept, rel=0.01), "what placement keeps whole"
    assert planned == 3 * (2 - resident) * plane / 2, "once in each of three micro-batches"


@pytest.mark.slow
def test_dropout_follows_the_data_and_not_the_workers(tmp_path):
    """GPT-2 drops out 10 % in training; its Conv1D layers go through here too."""
    model = models.save_small_model(tmp_path / "gpt2", "gpt2")
    digest, flips, _ = train(tmp_path, model, 1, 0)
    assert sum(sum(step.values()) for step in flips) > 100
    assert train(tmp_path, model, 2, 1)[:2] == (digest, flips)


@pytest.mark.slow
def test_activation_checkpointing_under_zero_3_changes_nothing(tmp_path, llama_folder, alone):
    digest, flips, _ = train(tmp_path, llama_folder, 2, 3, activation_checkpointing=True, micro_batch=1)
    assert flips == alone[1] and digest == alone[0]


@pytest.mark.slow
def test_a_head_that_trains_moves_alike_under_zero_3(tmp_path, llama_folder):
    """The gradient of the head is computed in its forward pass, where its weight, tied to the embeddings, is whole."""
    sections = {"floats": {"also_train": ["*embed_tokens*"]}, "loss": {"chunk_tokens": 20}}
    before, moved = load_model(ModelConfig(path=str(llama_folder))).lm_head.weight, {}
    for workers, stage in ((1, 0), (2, 3)):
        train(tmp_path, llama_folder, workers, stage, sections=sections, steps=1)
        model = load_model(ModelConfig(path=str(tmp_path / f"{workers}x{stage}/model")))
        moved[workers] = model.model.embed_tokens.weight - before
    assert moved[1].abs().mean() > 5e-5
    # AdamW's first step is the sign of the gradient, so a gradient of almost 0 may fall either way
    assert ((moved[2] - moved[1]).abs() > 1e-5).float().mean() < 1e-2


@pytest.mark.slow
def test_the_scales_move_alike_for_any_workers_and_stage(tmp_path, llama_folder):
    """One step of the float path: averaging over ranks and accumulation, clipping, AdamW."""
    scales = {}
    for workers, stage in ((1, 0), (2, 2), (3, 3)):
        train(tmp_path, llama_folder, workers, stage, lr=1e-2, steps=1, max_grad_norm=0.01)
        model = load_model(ModelConfig(path=str(tmp_path / f"{workers}x{stage}/model")))
        scales[workers] = torch.cat([p.flatten() for name, p in model.named_parameters() if ".scale_" in name])
    start = load_model(ModelConfig(path=str(tmp_path / "1x0/converted")))
    before = torch.cat([p.flatten() for name, p in start.named_parameters() if ".scale_" in name])
    assert (scales[1] - before).abs().mean() > 1e-3, "the scales must move"
    for workers in (2, 3):
        # AdamW's first step is the sign of the gradient, so a gradient of almost 0 may fall either way
        assert ((scales[workers] - scales[1]).abs() > 1e-5).float().mean() < 1e-2

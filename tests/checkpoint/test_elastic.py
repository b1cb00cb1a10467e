"""State that goes from any number of workers and ZeRO stage to any other is the same in every bit."""

import models
import processes
import pytest
import torch

from mbdist.checkpoint import Checkpoint

STEPS = 3
FIRST = (2, 2)  # (workers, stage) that trained
THEN = [(3, 3), (1, 0), (2, 1), (3, 0), (1, 3), (2, 3), (3, 2), (1, 1)]  # what goes on, each from the one before


def settings_of(run_dir, model, workers, stage):
    return models.run_settings(
        run_dir,
        model,
        cluster={"workers": workers, "zero_stage": stage, "cpus_per_worker": 1},
        floats={"lr": 1e-2, "also_train": ["*norm*"]},
        data={"max_eval_windows": 2},
        train={"steps": STEPS},
    )


def save_again(settings, saved):
    """What a rank does that goes on from a checkpoint, and is told at once to save."""
    from mbdist.comm.communicator import Communicator
    from mbdist.config import parse_config
    from mbdist.train.ending import end_process
    from mbdist.train.environment import leave_group, set_up_worker
    from mbdist.train.metrics import MetricsWriter
    from mbdist.train.trainer import Trainer

    config = parse_config(settings)
    device, communicator = set_up_worker(config), Communicator()
    metrics = MetricsWriter(saved / "metrics.jsonl", active=communicator.rank == 0)
    trainer = Trainer(config, device, communicator, metrics, saved=Checkpoint(saved))
    trainer._saved_step = 0
    trainer.checkpoint()
    trainer.writer.wait()
    communicator.all_gather_objects(None, "checkpoint")
    leave_group()
    end_process()


def content_of(folder):
    """({name: whole tensor}, what all ranks have alike). Flips of late, a row each, are in no order."""
    saved = Checkpoint(folder)
    whole = {name: torch.cat(saved.pieces(name)) for name in saved._pieces}
    for name in whole:
        if name.startswith("recent/"):
            whole[name] = sorted(map(tuple, whole[name].view(-1, 2).tolist()))
    return whole, {part: saved.state[part] for part in ("step", "boolean", "engine")}


@pytest.mark.slow
def test_all_state_survives_every_change_of_size_and_stage(tmp_path, llama_folder):
    run_dir, written = tmp_path / "run", tmp_path / f"run/checkpoints/step_{STEPS}"
    processes.train(settings_of(run_dir, llama_folder, *FIRST))
    saved = written.rename(tmp_path / "first")
    expected, shared = content_of(saved)
    kinds = {name.partition("/")[0] for name in expected}
    assert kinds == {"plane", "accumulator", "recent", "curvature", "float"}
    moments = [name for name in expected if name.endswith("exp_avg")]
    assert any("norm" in name for name in moments) and any("scale_in" in name for name in moments)
    assert all(expected[name].any() for name in moments)
    for workers, stage in THEN:
        processes.join(processes.start(save_again, settings_of(run_dir, llama_folder, workers, stage), saved))
        saved = written.rename(tmp_path / f"{workers}x{stage}")
        found, also = content_of(saved)
        assert found.keys() == expected.keys() and also == shared, (workers, stage)
        for name, tensor in expected.items():
            same = found[name] == tensor if isinstance(tensor, list) else torch.equal(found[name], tensor)
            assert same, (workers, stage, name)

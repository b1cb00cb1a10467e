"""Runs that are killed go on from their checkpoint and end with the same bits."""

import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import time
from pathlib import Path

import models
import processes
import pytest
import torch
import yaml
from ranks import run_on_ranks
from safetensors.torch import load_file

from mbdist.checkpoint import CheckpointWriter, Piece, complete_checkpoints
from mbdist.comm.communicator import Communicator
from mbdist.config.checkpoint import CheckpointConfig
from mbdist.train.metrics import read_metrics
from mbdist.train.status import describe_run

STEPS = 8


def settings_of(run_dir, model, workers=1, stage=2, lr=1e-2, **checkpoint):
    settings = models.run_settings(
        run_dir,
        model,
        cluster={"workers": workers, "zero_stage": stage, "cpus_per_worker": 1},
        floats={"lr": lr},
        data={"max_eval_windows": 2},
        train={"steps": STEPS},
        checkpoint={"every_steps": 3, **checkpoint},
    )
    return settings


def command(settings, folder):
    """The whole command, for runs of one worker, whose end loads the model again in one more process."""
    path = Path(folder) / f"{Path(settings['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return processes.mbdist("train", path, environment=os.environ | {"WANDB_MODE": "offline"})


def finish(settings, folder, expect=0):
    done = command(settings, folder).wait()
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout + done.stderr


def killed(settings, event="checkpoint"):
    """Start the run and kill all its workers when the event is logged."""
    ranks = processes.start_training(settings)
    processes.wait_for(settings["run_dir"], processes.logged(event), *ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def told(settings, folder, how, event):
    """Start the command and send it a signal when the event is logged: (its exit code, what it printed)."""
    process = command(settings, folder)
    processes.wait_for(settings["run_dir"], processes.logged(event), process)
    process.send_signal(how)
    done = process.wait(60)
    return done.returncode, done.stdout + done.stderr


def resumed(settings):
    """The steps that the run went on from."""
    records = read_metrics(Path(settings["run_dir"]) / "metrics.jsonl")
    return [record["step"] for record in records if record["event"] == "resumed"]


def outcome(run_dir):
    """(weights that were saved, {step: what it logged that a bit would change})."""
    weights = load_file(Path(run_dir) / "model/model.safetensors")
    keys = ("loss", "kl", "flips", "flipped_back", "flip_candidates", "learning_rate", "gradient_norm")
    steps = {
        r["step"]: {k: r[k] for k in keys}
        for r in read_metrics(Path(run_dir) / "metrics.jsonl")
        if r["event"] == "step"
    }
    return weights, steps


def check_same(one, other):
    weights, steps = one
    assert steps == other[1]
    assert weights.keys() == other[0].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other[0][name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, llama_folder):
    """The folder of a run of one worker that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    processes.train(settings_of(folder, llama_folder, keep_last=9))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(2, 2), (2, 3)])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, llama_folder, workers, stage):
    processes.train(settings_of(tmp_path / "whole", llama_folder, workers, stage))
    settings = settings_of(tmp_path / "killed", llama_folder, workers, stage)
    killed(settings)
    if stage == 2:  # as its user types it
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "mbdist.cli.main", "train", "run.yaml"]
        done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr[-3000:]
    else:
        processes.train(settings)
    assert len(resumed(settings)) == 1
    expected = outcome(tmp_path / "whole")
    assert sum(sum(step["flips"].values()) for step in expected[1].values()) > 100
    assert any(sum(step["flipped_back"].values()) for step in expected[1].values())
    check_same(outcome(tmp_path / "killed"), expected)


@pytest.mark.slow
def test_other_workers_and_another_stage_go_on_with_the_same_flips(tmp_path, llama_folder):
    """With the scales at rest: the order in which DeepSpeed adds up their gradients depends on the workers."""
    processes.train(settings_of(tmp_path / "whole", llama_folder, 1, 0, lr=0.0))
    expected = outcome(tmp_path / "whole")
    run_dir = tmp_path / "moving"
    killed(settings_of(run_dir, llama_folder, 2, 3, lr=0.0))
    processes.train(settings_of(run_dir, llama_folder, 3, 1, lr=0.0))
    weights, steps = outcome(run_dir)
    assert {number: step["flips"] for number, step in steps.items()} == {
        number: step["flips"] for number, step in expected[1].items()
    }
    assert all(torch.equal(weights[name], expected[0][name]) for name in weights if ".plane_" in name)
    (noted,) = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == "resumed"]
    assert noted["changed"]["cluster.workers"] == "2 -> 3"


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_says_so(tmp_path, llama_folder, undisturbed):
    settings = settings_of(tmp_path / "told", llama_folder, every_steps=None)
    code, output = told(settings, tmp_path, signal.SIGUSR1, event="step")
    assert code == 75 and "the same command goes on from there" in output
    processes.train(settings)
    check_same(outcome(tmp_path / "told"), outcome(undisturbed))


@pytest.mark.slow
def test_a_run_starts_from_the_checkpoint_that_is_named(tmp_path, llama_folder, undisturbed):
    """Of another run, whose folder stays as it is."""
    before = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    settings = settings_of(tmp_path / "run", llama_folder, resume=str(undisturbed / "checkpoints/step_3"))
    processes.train(settings)
    assert resumed(settings) == [3]
    weights, steps = outcome(undisturbed)
    check_same(outcome(tmp_path / "run"), (weights, {number: step for number, step in steps.items() if number > 3}))
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == before
    settings = settings_of(tmp_path / "other", llama_folder, resume="nowhere/step_3")
    assert "nowhere/step_3: there is no such folder" in finish(settings, tmp_path, expect=2)


def content_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*")) if path.is_file()}


def with_another_bit(file, place=-1):
    """What it held, before a bit of one byte became another."""
    content = bytearray(before := file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    return before


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, llama_folder):
    """(settings, checkpoint) of a run that was killed after its first. Its model and its text are its own."""
    folder = tmp_path_factory.mktemp("unfinished")
    model = shutil.copytree(llama_folder, folder / "llama")
    (folder / "text.txt").write_text("\n".join(list(pydoc_data.topics.topics.values())[:40]))
    settings = settings_of(folder / "run", model, keep_last=3)
    settings["data"]["train"] = {"type": "text", "paths": [str(folder / "text.txt")]}
    killed(settings)
    return settings, folder / "run/checkpoints/step_3"


@pytest.mark.slow
def test_a_setting_that_may_not_change_is_refused_before_anything_is_written(tmp_path, unfinished):
    settings, _ = unfinished
    run_dir = Path(settings["run_dir"])
    before = content_of(run_dir), content_of(run_dir / "converted")
    for changes, named in (
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"convert": settings["convert"] | {"planes": 3}}, "convert.planes: 2 -> 3"),
    ):
        output = finish(settings | changes, tmp_path, expect=2)
        assert named in output and "Traceback" not in output
        assert (content_of(run_dir), content_of(run_dir / "converted")) == before


@pytest.mark.slow
def test_what_a_run_reads_must_be_what_it_was(tmp_path, unfinished):
    settings, _ = unfinished
    run_dir = Path(settings["run_dir"])
    before = content_of(run_dir / "converted")
    changed = {
        run_dir.parent / "llama/model.safetensors": "the files of the model (model.path) are not those",
        run_dir.parent / "text.txt": "the training text (data.train) is another",
        max((run_dir / "converted").glob("*.safetensors")): "training started from other weights",
    }
    for file, message in changed.items():
        kept = with_another_bit(file, 0 if file.suffix == ".txt" else -1)  # the end of the text is held out
        assert message in finish(settings, tmp_path, expect=2)
        file.write_bytes(kept)
        assert content_of(run_dir / "converted") == before


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_refused_and_a_whole_one_goes_on(tmp_path, unfinished):
    settings, folder = unfinished
    (cut := folder.with_name("step_99")).mkdir()  # without its marker: was not written to the end
    named = settings | {"checkpoint": settings["checkpoint"] | {"resume": str(cut)}}
    assert f"{cut} is no complete checkpoint" in finish(named, tmp_path, expect=2)
    shard = folder / "shard_0.safetensors"
    whole = with_another_bit(shard)
    assert "its content is not what was written" in finish(settings, tmp_path, expect=2)
    shard.write_bytes(whole[:-100])
    assert f"{len(whole)} were written" in finish(settings, tmp_path, expect=2)
    shard.write_bytes(whole)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 0}))
    assert "format 0" in finish(settings, tmp_path, expect=2)
    (folder / "state.json").write_text(json.dumps(state))
    processes.train(settings)
    assert resumed(settings) == [3]


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder)
    settings["train"]["steps"] = 100_000
    first = command(settings, tmp_path)
    processes.wait_for(settings["run_dir"], processes.logged("step"), first)
    assert "another run is going on in run_dir" in finish(settings, tmp_path, expect=2)
    first.send_signal(signal.SIGTERM)
    assert first.wait().returncode == 75


@pytest.mark.slow
def test_a_run_stops_inside_conversion_and_evaluation_too(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder, every_steps=None)
    settings["convert"] = {"init": "calibrated", "calibration_tokens": 60_000}
    settings["data"]["max_eval_windows"] = 1500
    settings["train"] |= {"steps": 1, "track": ["tensorboard", "wandb"]}
    code, output = told(settings, tmp_path, signal.SIGTERM, event="converting")
    assert code == 75 and "stopped after step 0" in output and "converted" not in output
    assert "stopped after step 0" in describe_run(tmp_path / "run")
    code, output = told(settings, tmp_path, signal.SIGTERM, event="step")
    assert code == 75 and "stopped after step 1" in output and "finetuned" not in output
    settings["train"]["steps"] = 2
    output = finish(settings, tmp_path)
    assert "resumed after step 1" in output and "perplexity, finetuned" in output
    shown = describe_run(tmp_path / "run")
    assert "finished, after" in shown and "step 2/2: loss" in shown and "checkpoint: step_2" in shown
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_run_and_the_checkpoint_before_it(tmp_path, llama_folder, undisturbed):
    """A disk of its own, with room for one checkpoint and a half."""
    (folder, *_) = (undisturbed / "checkpoints").glob("step_*")
    room = sum(file.stat().st_size for file in folder.iterdir()) * 3 // 2
    (disk := tmp_path / "run/checkpoints").mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        output = finish(settings_of(tmp_path / "run", llama_folder, every_steps=2), tmp_path)
        assert [path.name for path in disk.glob("step_*")] == ["step_2"]
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "WARNING: no checkpoint after step 4" in output and "the run goes on" in output
    check_same(outcome(tmp_path / "run"), outcome(undisturbed))


def save_twice(folder, room_bytes):
    """What rank 0 reports of two checkpoints of 2 x 64 KiB, the first of them on a disk that fills up meanwhile."""
    communicator, reported = Communicator(timeout_s=4), []
    writer = CheckpointWriter(folder, CheckpointConfig(), communicator, lambda event, **_: reported.append(event))
    pieces = [Piece("x", communicator.rank << 14, torch.zeros(1 << 14))]
    write = writer._write

    def after_the_disk_filled(*work):
        if communicator.rank == 0:
            (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - room_bytes))
        (folder / f"ready_{communicator.rank}").touch()
        while len(list(folder.glob("ready_*"))) < 2:
            time.sleep(0.01)
        write(*work)

    writer._write = after_the_disk_filled
    writer.save(1, pieces, {"step": 1})
    writer.wait()
    communicator.all_gather_objects(None, "checkpoint")
    (folder / "ballast").unlink(missing_ok=True)
    writer._write = write
    writer.save(2, pieces, {"step": 2})
    writer.wait()
    communicator.all_gather_objects(None, "checkpoint")
    return reported, sorted(path.name for path in folder.glob("step_*"))


@pytest.mark.parametrize("room_kb", [0, 40, 100])  # for no note, for a note and no shard, for one shard of the two
def test_a_disk_that_fills_up_while_two_workers_write_costs_one_checkpoint(tmp_path, room_kb):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        found, _ = run_on_ranks(2, tmp_path, save_twice, tmp_path, room_kb << 10)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert found == (["checkpoint_failed", "checkpoint"], ["step_2"])


def test_a_folder_that_may_not_be_written_is_one_clear_error(tmp_path, llama_folder):
    (tmp_path / "theirs").mkdir(mode=0o555)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings_of(tmp_path / "theirs", llama_folder)))
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if bound and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere")
    train = [*bound, "mbdist", "train", str(path)]
    done = subprocess.run(train, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: cannot write to run_dir {tmp_path}/theirs: Permission denied\n"
    assert not list((tmp_path / "theirs").iterdir())


def test_the_best_checkpoints_are_kept_beside_the_last(tmp_path):
    writer = CheckpointWriter(
        tmp_path, CheckpointConfig(keep_last=1, keep_best=2), Communicator(), lambda *_, **__: None
    )
    for step, perplexity in enumerate([9.0, 5.0, None, 4.0, 7.0, 8.0, None], start=1):
        writer.save(step, [], {"step": step, "perplexity": perplexity})
        writer.wait()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_2", "step_4", "step_7"]


def told_that_a_node_leaves():
    return True


@pytest.mark.slow
def test_a_run_saves_once_where_a_node_is_about_to_leave(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder, workers=2, every_steps=None)
    processes.join(processes.start(processes.train_rank, settings, told_that_a_node_leaves))
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records if record["event"] == "checkpoint"] == [1, STEPS]


def hanging_before_it_prepares(settings):
    from mbdist.train import worker

    worker.prepare = lambda *_, **__: time.sleep(600)
    processes.train_rank(settings)


def test_a_worker_that_hangs_while_it_prepares_says_so_and_ends(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder)
    settings["train"]["hang_timeout_s"] = 4
    (rank,) = processes.start(hanging_before_it_prepares, settings)
    done = rank.wait(100)
    assert done.returncode == 1 and "s in preparing (train.hang_timeout_s = 4)" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_run_keeps_the_checkpoints_that_evaluated_best(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder, every_steps=2, keep_last=1, keep_best=1)
    settings["train"]["eval_every"] = 2
    processes.train(settings)
    measured = {
        record["step"]: record["perplexity"]
        for record in read_metrics(tmp_path / "run/metrics.jsonl")
        if record["event"] == "eval" and record["name"] == "in training"
    }
    best = min(measured, key=measured.__getitem__)
    kept = {path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")}
    assert list(measured) == [2, 4, 6] and kept == {f"step_{best}", f"step_{STEPS}"}
    before = outcome(tmp_path / "run")
    processes.train(settings)  # as if what follows the last step had failed
    assert resumed(settings) == [STEPS]
    check_same(outcome(tmp_path / "run"), before)

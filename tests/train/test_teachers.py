"""Teachers on disk, partitioned, and packed."""

import json
import pydoc_data.topics
import subprocess
import sys
from types import SimpleNamespace

import datasets
import models
import pytest
import torch
import yaml
from ranks import run_on_ranks
from test_run import mbdist_train, planes_of
from test_sharding import train

from mbdist.comm.communicator import Communicator
from mbdist.config import parse_config
from mbdist.config.convert import ConvertConfig
from mbdist.config.loss import LossConfig
from mbdist.config.model import ModelConfig
from mbdist.data import Corpus
from mbdist.data.batches import fetch
from mbdist.errors import ConfigError, UserError
from mbdist.loss import TopTokens, token_loss
from mbdist.model.readout import Head
from mbdist.model.tensor_files import StoredTensor
from mbdist.train import cache_writer
from mbdist.train.cache_writer import write_cache
from mbdist.train.metrics import read_metrics
from mbdist.train.teacher_cache import CachedTeacher, CacheHeader, bytes_a_token, cache_folder
from mbdist.train.teachers import live_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cached(tmp_path_factory, llama_folder):
    """(config, corpus) of a small run whose teacher is in its cache: 150 windows of 16 tokens, 20 tokens of each."""
    folder = tmp_path_factory.mktemp("cached")
    settings = models.run_settings(folder / "run", llama_folder)
    settings["loss"] = {"teacher": "cached", "cache": {"top_k": 20, "path": str(folder / "cache")}}
    settings["data"]["window"] = 16
    config = parse_config(settings)
    ids = torch.randint(0, models.VOCABULARY, (155, 16), generator=torch.Generator().manual_seed(0))
    windows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "learned": (ids > 40).tolist()})
    windows = windows.with_format("torch")
    corpus = Corpus(windows.select(range(150)), windows.select(range(150, 155)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_writer, "load_corpus", lambda *_: corpus)
        write_cache(config, Communicator(), CPU)
    return config, corpus


def opened(cached, **cache):
    config, corpus = cached
    loss = config.loss.model_copy(update={"cache": config.loss.cache.model_copy(update=cache)})
    source = ModelConfig(path=config.model.path)
    return CachedTeacher(config.model_copy(update={"loss": loss}), corpus.train, source, CPU)


def test_a_cache_holds_the_teachers_top_tokens(cached):
    config, corpus = cached
    batch = fetch(corpus.train, [149, 3, 70])
    everything = torch.ones(3 * 15, dtype=torch.bool)
    with live_teacher(config.model, "resident", CPU, torch.float32).teach(batch).opened(everything) as rows:
        live = rows[slice(None)].log_softmax(-1)
    for top_k in (20, 5):
        wanted = TopTokens.of(live, top_k)
        with opened(cached, top_k=top_k).teach(batch).opened(everything) as found:
            pass
        assert torch.equal(found.tokens, wanted.tokens)
        span = (TopTokens.of(live, 20).log_q[:, :1] - TopTokens.of(live, 20).log_q[:, -1:]).max()
        assert (found.log_q - wanted.log_q).abs().max() < span / 255, "half a unit, and what adding up to 1 shifts"
        torch.testing.assert_close(found.log_rest, wanted.log_rest, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.log_q.exp().sum(-1) + found.log_rest[:, 0].exp(), torch.ones(45))
    size = sum(file.stat().st_size for file in cache_folder(config).glob("*.safetensors"))
    assert size == pytest.approx(150 * 15 * bytes_a_token(20, models.VOCABULARY), rel=0.5), "small parts have headers"


@pytest.mark.parametrize("weights", [{}, {"cross_entropy_weight": 0.5, "kl_weight": 0.5}])
def test_learning_from_a_cache_is_learning_from_the_top_tokens(cached, weights):
    config, corpus = cached
    batch = fetch(corpus.train, [5, 6, 100])
    states, head = torch.randn(3, 16, 12), torch.nn.Linear(12, models.VOCABULARY)
    live = live_teacher(config.model, "resident", CPU, torch.float32)
    found = {}
    for name, teacher, loss in (
        ("cached", opened(cached), LossConfig(teacher="cached", **weights)),
        ("live", live, LossConfig(top_k=20, **weights)),
        ("all", live, LossConfig(**weights)),
    ):
        states = states.detach().requires_grad_()
        read = Head(head.forward, models.VOCABULARY)
        sums = token_loss(states, read, teacher.teach(batch), batch.input_ids, batch.learned, loss, 1, 1)
        sums[0].backward()
        found[name] = sums[0].detach(), states.grad
    torch.testing.assert_close(found["cached"][0], found["live"][0], rtol=1e-3, atol=0)
    difference = (found["cached"][1] - found["live"][1]).norm()
    assert difference < 0.01 * found["live"][1].norm()
    assert difference < 0.2 * (found["all"][1] - found["live"][1]).norm(), "much less than what top_k leaves out"


def test_a_folder_with_another_cache_is_not_written_to(cached, monkeypatch, tmp_path):
    config, corpus = cached
    monkeypatch.setattr(cache_writer, "load_corpus", lambda *_: corpus)

    def write(**cache):
        changed = config.loss.cache.model_copy(update=cache)
        write_cache(
            config.model_copy(update={"loss": config.loss.model_copy(update={"cache": changed})}), Communicator(), CPU
        )

    with pytest.raises(UserError, match=r"loss\.cache\.top_k = 21: name another folder"):
        write(top_k=21)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds no teacher cache, but is not empty"):
        write(path=str(tmp_path))
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    with pytest.raises(UserError, match=r"has room for 0\.0 GiB"):
        write(path=str(tmp_path / "new"))


def test_a_cache_that_does_not_serve_is_refused(cached, tmp_path):
    config, corpus = cached
    folder = cache_folder(config)
    with pytest.raises(UserError, match="no teacher cache: write it with mbdist teacher cache"):
        opened(cached, path=str(tmp_path))
    with pytest.raises(UserError, match=r"holds 20 tokens of a position, less than loss\.cache\.top_k = 21"):
        opened(cached, top_k=21)
    assert opened(cached, top_k=4).top_k == 4
    others = models.save_small_model(tmp_path / "other", layers=1)
    fewer = corpus.train.select(range(149))
    for windows, source, changes, name in (
        (corpus.train, ModelConfig(path=str(others)), {}, "the teacher"),
        (fewer, None, {}, "the training windows"),
        (corpus.train, None, {"temperature": 2.0}, "loss.temperature"),
    ):
        changed = config.model_copy(update={"loss": config.loss.model_copy(update=changes)})
        with pytest.raises(UserError, match=f"with other settings; these differ:\n  {name}"):
            CachedTeacher(changed, windows, source, CPU)
    assert CachedTeacher(config, corpus.train, None, CPU).perplexity(fewer) is None
    part = sorted(folder.glob("*.safetensors"))[1]
    content = part.read_bytes()
    part.unlink()
    try:
        with pytest.raises(UserError, match="has 74 of its 75 parts"):
            opened(cached)
        part.write_bytes(content[:100])
        with pytest.raises(UserError, match=f"cannot read {part}"):
            opened(cached).teach(fetch(corpus.train, [2]))
    finally:
        part.write_bytes(content)


def test_what_a_cache_cannot_teach_is_refused_at_once(llama_folder, tmp_path):
    for loss, message in (
        ({"teacher": "cached", "hidden": "mse"}, "loss.hidden = mse needs the teacher's hidden states"),
        ({"teacher": "cached", "top_k": 8}, "set loss.cache.top_k instead"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(models.run_settings(tmp_path / "run", llama_folder, loss=loss))


def short_text(folder, **sections):
    """Settings of a run on little text: some hundred windows."""
    text = folder / "text.txt"
    text.write_text(pydoc_data.topics.topics["typesseq"] * 2)
    settings = models.run_settings(folder / "run", **sections)
    settings["data"]["train"] = {"type": "text", "paths": [str(text)]}
    return settings


def write_cache_by_command(settings, folder, output, *arguments):
    path = folder / "cache.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mbdist.cli.main", "teacher", "cache", str(path), "-o", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_workers_write_a_cache_together_and_a_run_learns_from_it(tmp_path, llama_folder):
    settings = short_text(tmp_path, model=llama_folder, train={"steps": 8}, floats={"lr": 2e-2})
    settings["loss"] = {"cache": {"top_k": 64, "path": str(tmp_path / "taught")}, "teacher_placement": "sharded"}
    done = write_cache_by_command(settings, tmp_path, tmp_path / "taught", "--workers", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    parts = {file.name: file.read_bytes() for file in (tmp_path / "taught").glob("*.safetensors")}
    header = CacheHeader.read(tmp_path / "taught")
    assert len(parts) == header.num_parts > 60
    removed = sorted(parts)[5]
    (tmp_path / "taught" / removed).unlink()
    settings["loss"]["teacher_placement"] = "resident"
    done = write_cache_by_command(settings, tmp_path, tmp_path / "taught")  # goes on, with one worker
    assert done.returncode == 0 and "196 bytes a token" in done.stdout, done.stdout + done.stderr[-3000:]
    assert {file.name: file.read_bytes() for file in (tmp_path / "taught").glob("*.safetensors")} == parts
    settings["loss"] = {"cache": settings["loss"]["cache"], "teacher": "cached"}
    mbdist_train(settings, tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["perplexity"]["float"] == pytest.approx(header.held_out["perplexity"])
    steps = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["event"] == "step"]
    assert steps[-1]["memory"]["teacher"] == 0
    assert sum(step["kl"] for step in steps[-3:]) / 3 < 0.95 * steps[0]["kl"], "the student nears its teacher"


@pytest.mark.slow
def test_a_sharded_teacher_teaches_the_same(tmp_path, llama_folder):
    found = {}
    for placement, stage in (("resident", 2), ("sharded", 3)):
        (folder := tmp_path / placement).mkdir()
        loss = {"teacher_placement": placement, "hidden": "mse", "chunk_tokens": 20}
        found[placement] = train(folder, llama_folder, 2, stage, sections={"loss": loss}, steps=3)
    assert sum(sum(step.values()) for step in found["resident"][1]) > 100
    assert found["sharded"][:2] == found["resident"][:2]
    whole, parts = found["resident"][2][-1]["memory"], found["sharded"][2][-1]["memory"]
    assert found["sharded"][2][-1]["kl"] == found["resident"][2][-1]["kl"]
    assert parts["teacher"] < 0.52 * whole["teacher"], "half, and the norms"


def packed_on_a_rank(folder):
    """(bytes that the rank keeps, bytes that it read, the logits of a sharded packed teacher)."""
    reads, read = [], StoredTensor.read

    def noted(tensor, first, count):
        reads.append(count * tensor.dtype.itemsize)
        return read(tensor, first, count)

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOCAL_RANK", str(torch.distributed.get_rank()))  # DeepSpeed asks for it
        patched.setattr(StoredTensor, "read", noted)
        teacher = live_teacher(ModelConfig(path=folder), "sharded", CPU, torch.float32)
        kept = sum(getattr(p, "ds_tensor", p).nbytes for p in teacher.parameters())
        ids = torch.arange(24)[None]
        return kept, sum(reads), teacher.read(ids, lambda states, head: head.logits(states.flatten(0, 1)).detach())


@pytest.mark.slow
def test_a_sharded_packed_teacher_is_read_in_parts(tmp_path):
    """Three ranks; odd sizes leave padded parts."""
    config = ConvertConfig(planes=3, init="svid")
    _, model = models.convert(models.small_model(), tmp_path, config)
    whole = sum(p.nbytes for p in model.parameters())
    logits = model(torch.arange(24)[None]).logits[0].detach()
    for kept, read, found in run_on_ranks(3, tmp_path, packed_on_a_rank, str(tmp_path / "out")):
        assert kept < 0.36 * whole and read < 0.36 * whole, "a third, and what stays whole"
        torch.testing.assert_close(found, logits)


@pytest.mark.slow
def test_a_packed_teacher_stays_packed(tmp_path, llama_folder):
    """Four planes of the teacher that a run converted to, of one plane's student."""
    teacher = short_text(tmp_path, model=llama_folder, convert={"planes": 4}, train={"steps": 0})
    teacher["run_dir"] = str(tmp_path / "teacher")
    mbdist_train(teacher, tmp_path)
    settings = short_text(tmp_path, model=llama_folder, convert={"planes": 1}, train={"steps": 1})
    settings["loss"] = {"teacher_model": {"path": str(tmp_path / "teacher/model")}}
    mbdist_train(settings, tmp_path)
    records = list(read_metrics(tmp_path / "run/metrics.jsonl"))
    of_run, of_teacher = (json.loads((tmp_path / each / "summary.json").read_text()) for each in ("run", "teacher"))
    assert of_run["perplexity"]["float"] == pytest.approx(of_teacher["perplexity"]["converted"], rel=1e-4)
    planes, model = planes_of(tmp_path / "teacher/model")
    floats = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    memory = next(record for record in records if record["event"] == "step")["memory"]
    assert memory["teacher"] == sum(plane.nbytes for plane in planes.values()) + floats

"""``mbdist bench teachers``: what a cached teacher costs in quality, by the tokens that it keeps, and what each kind of
teacher costs in memory and time.

Quality: the small LLaMA of ``mbdist bench codecs``, trained on the run's text, becomes multi-Boolean and learns from
its float self again, on the same batches from a whole teacher, from its most likely tokens, and from a cache of them.
Memory and time: two ranks train a larger model of random weights with every kind of teacher, one kind after the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from mbdist.bench.codecs import train_small_model
from mbdist.bench.process import in_own_process, one_process_trainer
from mbdist.bench.quality import changed_config
from mbdist.bench.table import table_of
from mbdist.config import RunConfig, write_config
from mbdist.errors import RunError

_KINDS_STEPS = 12
_WARM_UP_STEPS = 4


def bench_teachers(config: RunConfig, top_k: list[int], ranks: int, json_file: Path | None) -> dict[str, list[dict]]:
    """{"quality": rows, "kinds": rows}; prints both tables."""
    with tempfile.TemporaryDirectory() as scratch:
        model = config.model.model_copy(update={"path": f"{scratch}/float", "gguf_file": None})
        base = config.model_copy(update={"run_dir": f"{scratch}/runs", "model": model})
        in_own_process(train_small_model, base)
        found = {"quality": _quality(base, sorted(top_k))}
        if ranks > 1:
            found["kinds"] = _kinds(base, Path(scratch), ranks)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for rows in found.values():
        Console().print(table_of(rows))
    return found


def _quality(base: RunConfig, top_k: list[int]) -> list[dict]:
    cache = {"loss.cache.path": f"{base.run_dir}/cache", "loss.cache.top_k": top_k[-1]}
    variants: list[tuple[str, int | None, dict]] = [("whole distribution", None, {})]
    variants += [("live, top k", k, {"loss.top_k": k}) for k in top_k]
    variants += [("cached, top k", k, {**cache, "loss.cache.top_k": k, "loss.teacher": "cached"}) for k in top_k]
    variants.append(("no teacher", None, {"loss.teacher": "none"}))
    in_own_process(_write_cache, changed_config(base, cache))
    rows: list[dict] = []
    for name, k, changes in variants:
        found = in_own_process(_measure_quality, changed_config(base, changes))
        rows.append({"teacher": name, "k": k, **{key: found[key] for key in ("kl", "perplexity", "bytes_a_token")}})
        rows[-1]["perplexity_over_whole"] = round(rows[-1]["perplexity"] / rows[0]["perplexity"], 4)
        Console().print(rows[-1])
    return rows


def _write_cache(config: RunConfig) -> dict:
    from mbdist.comm.communicator import Communicator
    from mbdist.train.cache_writer import write_cache
    from mbdist.train.environment import set_up_worker

    device = set_up_worker(config)
    write_cache(config, Communicator(), device)
    return {}


def _measure_quality(config: RunConfig) -> dict:
    """KL to the float model and perplexity on the held-out windows."""
    from mbdist.train.evaluate import evaluate
    from mbdist.train.teacher_cache import CachedTeacher, bytes_a_token
    from mbdist.train.teachers import live_teacher

    trainer = one_process_trainer(config)
    trainer.engine.module.train()
    for step in range(config.train.steps):
        trainer.step(step)
    trainer.engine.module.eval()
    found = evaluate(
        lambda ids, read: trainer.read_student(ids, read)[1],
        trainer.corpus.eval,
        config.train.eval_batch,
        trainer.communicator,
        trainer.device,
        live_teacher(config.model, "resident", trainer.device, trainer.dtype).teach,
    )
    cached = isinstance(trainer.teacher, CachedTeacher)
    size = bytes_a_token(trainer.teacher.top_k, trainer.teacher.header.vocabulary) if cached else None
    return {"kl": round(found.kl, 4), "perplexity": round(found.perplexity, 3), "bytes_a_token": size}


def _kinds(base: RunConfig, scratch: Path, ranks: int) -> list[dict]:
    model = base.model.model_copy(update={"path": str(scratch / "random")})
    config = changed_config(
        base.model_copy(update={"model": model}),
        {
            "train.steps": _KINDS_STEPS,
            "train.sequences_per_step": 8 * ranks,
            "train.micro_batch": 8,
            "train.check_planes_every": 0,
            "cluster.workers": ranks,
            "data.max_eval_windows": ranks,
            "loss.cache.path": str(scratch / "random_cache"),
        },
    )
    in_own_process(_make_random_models, config, str(scratch / "packed"))
    rows: list[dict] = []
    for name, changes in (
        ("resident", {}),
        ("sharded", {"loss.teacher_placement": "sharded"}),
        ("packed, 4 planes", {"loss.teacher_model": {"path": str(scratch / "packed")}}),
        ("cached", {"loss.teacher": "cached"}),
    ):
        of_kind = changed_config(config, changes)
        if name == "cached":
            _start(of_kind, ranks, "teacher", "cache")
        _start(of_kind, ranks, "train")
        rows.append({"teacher": name, **_measured(of_kind)})
        rows[-1]["over_resident"] = round(rows[-1]["step_s"] / rows[0]["step_s"], 3)
        Console().print(rows[-1])
    return rows


def _make_random_models(config: RunConfig, packed: str) -> dict:
    """A LLaMA of 6.4 M linear weights in ``config.model.path``, and the same in four planes."""
    import torch
    import transformers

    from mbdist.convert import Conversion
    from mbdist.model.loading import load_tokenizer
    from mbdist.model.saving import save_model

    tokenizer = load_tokenizer(config.model.model_copy(update={"path": str(Path(packed).with_name("float"))}))
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}
    torch.manual_seed(config.seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)
    )
    save_model(model, tokenizer, Path(config.model.path))
    four_planes = config.convert.model_copy(update={"planes": 4, "init": "svid"})
    for _ in Conversion(config.model, Path(packed), four_planes).run(tokenizer=tokenizer):
        pass
    return {}


def _start(config: RunConfig, ranks: int, *verb: str) -> None:
    path = Path(config.run_dir).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_config(config, path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, "-m", "mbdist.cli.main", *verb, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(verb)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _measured(config: RunConfig) -> dict:
    from mbdist.train.metrics import read_metrics

    records = [record for record in read_metrics(Path(config.run_dir) / "metrics.jsonl") if record["event"] == "step"]
    return {
        "teacher_bytes_a_rank": records[-1]["memory"]["teacher"],
        "step_s": round(statistics.median(record["seconds"] for record in records[_WARM_UP_STEPS:]), 4),
    }

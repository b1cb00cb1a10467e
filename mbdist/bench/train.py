"""``mbdist bench train``: a Boolean finetuning step beside the same model's dense bf16 step, in one run on one machine.

Both train with the same teacher, batch, loss and DeepSpeed; the dense one is what a user would do without this project:
bf16 weights, fp32 masters and AdamW moments for every linear weight. Each kind runs in a process of its own, so that
peak memory is its own.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mbdist.bench.process import in_own_process, one_process_trainer, seconds_of
from mbdist.config import RunConfig
from mbdist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP_STEPS = 2  # the first builds kernels and measures curvature only


def bench_train(config: RunConfig, steps: int, json_file: Path | None) -> dict:
    """Measure, print a table, write ``json_file`` where given, and return its content."""
    if config.loss.hidden != "none":
        raise UserError("bench train compares steps without a hidden-state term; add loss.hidden=none")
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        config = config.model_copy(
            update={
                "run_dir": scratch,
                "train": config.train.model_copy(
                    update={
                        "steps": _WARM_UP_STEPS + steps,
                        "micro_batch": config.train.sequences_per_step,
                        "check_planes_every": 0,
                    }
                ),
                "cluster": config.cluster.model_copy(update={"workers": 1, "zero_stage": 0}),
                "boolean": config.boolean.model_copy(update={"warmup_fraction": 0.0}),
            }
        )
        console.print(
            f"{config.model.path}: {steps} steps of each kind, {config.train.sequences_per_step} sequences of "
            f"{config.data.window} tokens"
        )
        ours = in_own_process(_measure_boolean, config)
        dense = in_own_process(_measure_dense, config)
    result = {
        "step_time_ratio": round(ours["step_s"] / dense["step_s"], 3),
        "state_bytes_per_weight": {
            "ours": round(ours["state_bytes_per_weight"], 3),
            "dense": round(dense["state_bytes_per_weight"], 3),
        },
        "peak_rss_ratio": round(ours["peak_rss"] / dense["peak_rss"], 3),
        "planes": config.convert.planes,
        "tokens_per_step": config.tokens_per_step,
        "steps": steps,
        "device": ours["device"],
        "versions": ours["versions"],
    }
    table = Table("", "multi-Boolean", "dense bf16 + AdamW", "ratio")
    table.add_row(
        "step, s (median)",
        f"{ours['step_s']:.2f}",
        f"{dense['step_s']:.2f}",
        f"{result['step_time_ratio']:.2f}",
    )
    ours_bytes, dense_bytes = result["state_bytes_per_weight"].values()
    table.add_row(
        "state, bytes a linear weight",
        f"{ours_bytes:.2f}",
        f"{dense_bytes:.2f}",
        f"{ours_bytes / dense_bytes:.3f}",
    )
    table.add_row(
        "process peak, GiB (teacher, activations and logits included)",
        f"{ours['peak_rss'] / 2**30:.2f}",
        f"{dense['peak_rss'] / 2**30:.2f}",
        f"{result['peak_rss_ratio']:.2f}",
    )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _timed_steps(step, total: int) -> float:
    """Median seconds of the steps after the warm-up."""
    return statistics.median(seconds_of(step, range(total))[_WARM_UP_STEPS:])


def _measure_boolean(config: RunConfig) -> dict:
    import importlib.metadata

    trainer = one_process_trainer(config)
    trainer.engine.module.train()
    step_s = _timed_steps(trainer.step, config.train.steps)
    versions = {name: importlib.metadata.version(name) for name in ("mbdist", "torch", "deepspeed", "transformers")}
    return {
        "step_s": step_s,
        "state_bytes_per_weight": trainer.state_bytes_per_weight(),
        "device": str(trainer.device),
        "versions": versions,
    }


def _measure_dense(config: RunConfig) -> dict:
    from mbdist.train.environment import set_up_worker

    dense = DenseTrainer(config, set_up_worker(config))
    step_s = _timed_steps(dense.step, config.train.steps)
    return {"step_s": step_s, "state_bytes_per_weight": dense.engine.state_bytes() / dense.linear_weights}


class DenseTrainer:
    """A run's data, teacher and loss around a dense student under DeepSpeed bf16: what a user would do without this
    project. Trains the linear weights that would be converted, and ``floats.also_train``."""

    def __init__(self, config: RunConfig, device, student: PreTrainedModel | None = None):
        """``student``: instead of the one that ``config.model`` names; ZeRO-3 has partitioned it."""
        from mbdist.comm.communicator import Communicator
        from mbdist.data import Batches, load_corpus
        from mbdist.engine.dense import DenseEngine
        from mbdist.model.layers import convertible_layers
        from mbdist.model.loading import load_model, load_tokenizer
        from mbdist.model.readout import Readout
        from mbdist.train.environment import compute_dtype
        from mbdist.train.prepare import teacher_source
        from mbdist.train.teachers import live_teacher
        from mbdist.train.trained_floats import choose_trained_floats

        communicator = Communicator(config.comm.timeout_s)
        self.config, self.device = config, device
        dtype = compute_dtype(config.train.precision, device)
        if student is None:
            student = load_model(config.model).to(device)
            choose_trained_floats(student, config.floats.also_train, dtype)
        else:
            student.requires_grad_(False)
        if config.train.activation_checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        linear = list(convertible_layers(student, config.convert.include, config.convert.exclude).values())
        for layer in linear:
            layer.requires_grad_(True)
        self.linear_weights = sum(getattr(layer.weight, "ds_numel", layer.weight.numel()) for layer in linear)
        source = teacher_source(config)
        self.teacher = live_teacher(source, "resident", device, dtype) if source is not None else None
        corpus = load_corpus(config.data, load_tokenizer(config.model))
        ranks = (communicator.rank, communicator.world_size)
        batch = (config.train.sequences_per_step, config.train.micro_batch)
        self.batches = Batches(corpus.train, config.seed, *batch, *ranks)
        self.readout = Readout(student)
        self.engine = DenseEngine(student, config)
        self.engine.engine.module.train()

    def step(self, number: int) -> None:
        """One step of one micro-batch a rank."""
        from functools import partial

        from mbdist.loss import token_loss

        batch = self.batches.micro_batch_at(number, 0).to(self.device)
        read = partial(
            token_loss,
            lesson=self.teacher.teach(batch) if self.teacher is not None else None,
            input_ids=batch.input_ids,
            learned=batch.learned,
            config=self.config.loss,
            num_targets=int(batch.learned[:, 1:].sum()),
            num_sequences=len(batch.input_ids),
        )
        _, (loss, _, _) = self.readout(self.engine.forward, read, batch.input_ids, use_cache=False)
        self.engine.backward(loss)
        self.engine.step()

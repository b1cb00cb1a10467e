"""``mbdist bench start``: what ranks hold while a run starts, against what they hold once it has.

A LLaMA-shaped multi-Boolean model of random bits is written, and ranks under ZeRO-3 start a run of it on the CPU.
Memory is the kernel's count of a process's resident pages, above what it had before (interpreter, libraries, data).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mbdist.bench.process import seconds_of
from mbdist.bench.quality import changed_config
from mbdist.config import RunConfig, parse_config
from mbdist.errors import RunError
from mbdist.train.peak_memory import forget_peak, resident_bytes

_SETTINGS = {
    "loss.teacher": "none",
    "train.steps": 10,
    "train.micro_batch": 1,
    "train.precision": "bf16",
    "train.check_planes_every": 0,
    "floats.also_train": [],
    "cluster.zero_stage": 3,
    "cluster.device": "cpu",
    "cluster.cpus_per_worker": 1,
}
_BUFFERS = 32 << 20  # of files on their way into tensors, and what the allocator keeps of them


def bench_start(
    config: RunConfig,
    shape: str,  # of llama_shapes.SHAPES
    planes: int,
    ranks: int,
    steps: int,  # to take after the start
    dense: bool,  # DeepSpeed's bf16 training of a float model of the shape instead
    scratch: Path | None,  # for the model; it is large
    json_file: Path | None,
) -> dict:
    """Measure, print a table, write ``json_file`` where given, and return its content. Raises RunError where a rank's
    peak is above what it holds in the end and a block."""
    console = Console()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, "-c", _WRITE, config.model_dump_json(), shape, str(planes), model], check=True)
        settings = {
            "model.path": str(model),
            "model.gguf_file": None,
            "train.sequences_per_step": ranks,
            "cluster.workers": ranks,
        }
        spec = Path(folder) / "spec.json"
        run = changed_config(config, _SETTINGS | settings).model_copy(update={"run_dir": f"{folder}/run"})
        spec.write_text(
            json.dumps({"config": run.model_dump(mode="json"), "steps": steps, "dense": dense, "folder": folder})
        )
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [sys.executable, *torchrun, "-m", "mbdist.bench.start", str(spec)], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise RunError(f"the ranks did not start:\n{done.stderr[-4000:]}")
        of_ranks = [json.loads((Path(folder) / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
        model_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    result = {
        "shape": shape,
        "planes": planes,
        "dense": dense,
        "zero_stage": 3,
        "model_bytes": model_bytes,
        "ranks": of_ranks,
    }
    names = [name for name in of_ranks[0] if name.endswith("_bytes")]
    table = Table("GB", *(f"rank {rank}" for rank in range(ranks)))
    for name in names:
        table.add_row(name.removesuffix("_bytes"), *(f"{of_rank[name] / 1e9:.3f}" for of_rank in of_ranks))
    for name in ("start_s", "step_s"):
        if name in of_ranks[0]:
            table.add_row(name, *(f"{of_rank[name]:.2f}" for of_rank in of_ranks))
    kind = "dense bf16 with AdamW" if dense else f"K = {planes}: {model_bytes / 1e9:.3f} GB of weights"
    console.print(f"{shape}, {kind}")
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for rank, found in enumerate(of_ranks if not dense else []):
        allowed = found["after_start_bytes"] + found["one_layer_bytes"] + _BUFFERS
        if found["peak_while_starting_bytes"] > allowed:
            raise RunError(f"rank {rank} held more while it started than it holds now and a block")
    return result


_WRITE = (
    "import json, sys; from mbdist.bench.start import write_random_model; "
    "write_random_model(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])"
)


def write_random_model(config: str, shape: str, planes: int, folder: str) -> None:
    """A multi-Boolean LLaMA with random planes, floats in bf16, and the tokenizer of the run config (JSON)."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from mbdist.bench.llama_shapes import llama_config
    from mbdist.config.model import ModelConfig
    from mbdist.model.layers import convertible_layers, is_scale
    from mbdist.model.loading import empty_model, load_tokenizer
    from mbdist.model.quantizer import MultiBooleanConfig
    from mbdist.model.saving import save_gathered_model

    tokenizer = load_tokenizer(RunConfig.model_validate_json(config).model)
    llama = llama_config(shape, len(tokenizer))
    with init_empty_weights():
        layers = convertible_layers(AutoModelForCausalLM.from_config(llama))
    llama.quantization_config = MultiBooleanConfig(planes=dict.fromkeys(layers, planes)).to_dict()
    llama.save_pretrained(folder)
    model = empty_model(ModelConfig(path=folder))
    layout = {
        name: p if p.dtype == torch.int32 or is_scale(name) else p.to(torch.bfloat16)
        for name, p in model.state_dict().items()
    }

    def content():
        torch.manual_seed(0)
        for name, empty in layout.items():
            if empty.dtype == torch.int32:
                yield name, torch.randint(-(2**31), 2**31, empty.shape, dtype=torch.int32)
            elif is_scale(name):  # so that every plane keeps the size of what goes through
                yield name, torch.full(empty.shape, (planes * llama.hidden_size) ** -0.25)
            elif empty.dim() == 1:
                yield name, torch.ones(empty.shape, dtype=empty.dtype)
            else:
                yield name, torch.empty(empty.shape, dtype=empty.dtype).normal_(std=0.02)

    save_gathered_model(model, tokenizer, Path(folder), layout, content())


def _read() -> int:
    """Bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main(spec_file: str) -> None:
    """One rank, with torchrun's variables set; writes ``rank_<r>.json``."""
    spec = json.loads(Path(spec_file).read_text())
    config = parse_config(spec["config"])
    from mbdist.train.environment import leave_group, pin_accelerator, set_up_worker

    pin_accelerator(config)
    device = set_up_worker(config)
    import torch.distributed as dist

    from mbdist.comm.communicator import Communicator
    from mbdist.data import load_corpus
    from mbdist.model.loading import load_tokenizer
    from mbdist.train.metrics import MetricsWriter
    from mbdist.train.trainer import Trainer

    rank = dist.get_rank()
    for turn in range(2):  # the first tokenises, the others find it done
        if (rank == 0) == (turn == 0):
            load_corpus(config.data, load_tokenizer(config.model))
        dist.barrier()
    before, read_before = resident_bytes()[0], _read()
    forget_peak()
    started = time.perf_counter()
    if spec["dense"]:
        found = {"before_bytes": before, **_measure_dense(config, device, spec["steps"], before)}
        (Path(spec["folder"]) / f"rank_{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        leave_group()
        return
    metrics = MetricsWriter(Path(spec["folder"]) / "metrics.jsonl", active=False)
    trainer = Trainer(config, device, Communicator(config.comm.timeout_s), metrics)
    start_s = time.perf_counter() - started
    (held, most), read = resident_bytes(), _read() - read_before
    for entry in trainer.boolean.accumulated:
        entry.accumulator.zero_()  # pages that nobody wrote are not there yet
    categories = trainer.memory_bytes()
    found = {
        "before_bytes": before,
        "after_start_bytes": held - before,
        "peak_while_starting_bytes": most - before,
        "read_bytes": read,
        "one_layer_bytes": _one_layer(trainer.boolean.layers),
        "steady_state_bytes": resident_bytes()[0] - before,
        **{f"{name}_bytes": size for name, size in categories.items() if name != "process" and size},
        "start_s": start_s,
    }
    if spec["steps"]:
        trainer.engine.module.train()
        trainer.take_bytes()
        trainer.peak_memory.restart()
        found["step_s"] = statistics.median(seconds_of(trainer.step, range(spec["steps"])))
        sent = trainer.take_bytes()[0]
        found["signal_bytes"] = sent.get("signal", 0) // max(1, spec["steps"] - 1)  # the first step only measures
        found["peak_of_a_step_bytes"] = resident_bytes()[1] - before
    (Path(spec["folder"]) / f"rank_{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    leave_group()


def _measure_dense(config: RunConfig, device, steps: int, before: int) -> dict:
    """A model of the shape with random weights, materialised partitioned, all linear layers training."""
    from transformers import AutoModelForCausalLM

    from mbdist.bench.train import DenseTrainer
    from mbdist.engine.dense import made_partitioned
    from mbdist.model.loading import load_model_config

    architecture = load_model_config(config.model)
    del architecture.quantization_config
    started = time.perf_counter()
    student = made_partitioned(lambda: AutoModelForCausalLM.from_config(architecture), config)
    dense = DenseTrainer(config, device, student)
    found = {"after_start_bytes": resident_bytes()[0] - before, "start_s": time.perf_counter() - started}
    found["linear_weights"] = dense.linear_weights
    if steps:
        found["step_s"] = statistics.median(seconds_of(dense.step, range(steps)))
    return found | {"peak_of_a_step_bytes": resident_bytes()[1] - before}


def _one_layer(layers: dict) -> int:
    """Bytes of the planes of a block, whole."""
    of_block = [name for name in layers if ".0." in name]
    return sum(layers[n].num_planes * layers[n].num_weights // 8 for n in of_block)


if __name__ == "__main__":
    main(sys.argv[1])

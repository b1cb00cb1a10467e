"""Runs that benchmarks watch from outside: `mbdist launch local` with a random model of a config's architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, set_seed

from mbdist.config import RunConfig, write_config
from mbdist.config.model import ModelConfig
from mbdist.errors import RunError
from mbdist.model.loading import load_model_config, load_tokenizer
from mbdist.train.metrics import read_metrics


def small_model(source: ModelConfig, folder: Path, hidden: int, blocks: int) -> ModelConfig:
    """A random model of the architecture and with the tokenizer of ``source``."""
    shape = load_model_config(source)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    shape.update({"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": blocks, **heads})
    set_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def start(config: RunConfig) -> subprocess.Popen:
    path = Path(f"{config.run_dir}.yaml")
    write_config(config, path)
    command = [sys.executable, "-m", "mbdist.cli.main", "launch", "local", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, config: RunConfig) -> dict:
    """The summary of the run. Raises RunError with its output where it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise RunError(f"the run failed:\n{output[-4000:]}")
    return json.loads((Path(config.run_dir) / "summary.json").read_text())


def records_of(config: RunConfig) -> list[dict]:
    """What the run has logged so far."""
    metrics = Path(config.run_dir) / "metrics.jsonl"
    return list(read_metrics(metrics)) if metrics.exists() else []

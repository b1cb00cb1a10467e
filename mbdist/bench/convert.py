"""``mbdist bench convert``: the memory of a conversion.

A float LLaMA of random bf16 weights is written, of a shape's width and a few layers; a process of its own converts it.
Memory is the kernel's count of the process's resident pages, above what the interpreter and its libraries hold.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from rich.console import Console

from mbdist.bench.process import in_own_process
from mbdist.config import RunConfig
from mbdist.config.convert import ConvertConfig
from mbdist.config.model import ModelConfig
from mbdist.train.peak_memory import forget_peak, resident_bytes


def bench_convert(
    config: RunConfig,  # whose tokenizer and text are used
    shape: str,  # of llama_shapes.SHAPES
    layers: int,  # instead of the shape's
    convert: ConvertConfig,
    scratch: Path | None,  # for the model and what it becomes
    json_file: Path | None,
) -> dict:
    """Measure, print, write ``json_file`` where given, and return its content."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        in_own_process(_write_model, config, shape, layers, folder)
        found = in_own_process(_convert, config, convert, folder)
    described = {"shape": shape, "layers": layers, "planes": convert.planes, "init": convert.init}
    names = ("model_bytes", "before_bytes", "peak_bytes", "seconds")
    result = described | {name: found[name] for name in names}
    peak, before, size = (f"{found[name] / 2**20:,.0f}" for name in ("peak_bytes", "before_bytes", "model_bytes"))
    Console(highlight=False, soft_wrap=True).print(
        f"{shape}, {layers} layer(s), K = {convert.planes}, {convert.init}: at the most {peak} MiB above the {before} "
        f"before, in {found['seconds']:,.1f} s; the float model has {size}"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _write_model(config: RunConfig, shape: str, layers: int, folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from mbdist.bench.llama_shapes import llama_config
    from mbdist.model.loading import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(shape, len(tokenizer), layers), dtype=torch.bfloat16)
    model.save_pretrained(f"{folder}/float")
    tokenizer.save_pretrained(f"{folder}/float")
    return {}


def _convert(config: RunConfig, convert: ConvertConfig, folder: str) -> dict:
    import torch

    from mbdist.convert import Conversion
    from mbdist.data.calibration import calibration_batches
    from mbdist.data.windows import load_windows
    from mbdist.model.loading import load_tokenizer
    from mbdist.train.environment import compute_dtype

    source = ModelConfig(path=f"{folder}/float")
    tokenizer, batches = load_tokenizer(source), []
    if convert.needs_calibration:
        windows = load_windows(config.data.train, config.data, tokenizer)
        batches = calibration_batches(windows, convert.calibration_tokens)
    before = resident_bytes()[0]
    forget_peak()
    started = time.perf_counter()
    dtype = compute_dtype(config.train.precision, torch.device("cpu"))
    for _report in Conversion(source, Path(folder) / "packed", convert, dtype).run(batches, tokenizer):
        pass
    return {
        "model_bytes": sum(file.stat().st_size for file in Path(folder, "float").glob("*.safetensors")),
        "before_bytes": before,
        "peak_bytes": resident_bytes()[1] - before,
        "seconds": round(time.perf_counter() - started, 1),
    }

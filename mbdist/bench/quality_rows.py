"""The measurements behind the rows of ``mbdist bench quality``. Each runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mbdist.bench.process import in_own_process, one_process_trainer
from mbdist.bench.uniform import bits_per_weight as uniform_bits
from mbdist.bench.uniform import gptq, round_to_nearest
from mbdist.config import RunConfig
from mbdist.config.model import ModelConfig
from mbdist.optim.schedule import warmup_cosine

_KL_WINDOWS = 64  # KL needs the float model's logits too, so it is measured on the first windows only
_FLOAT_LR = 1e-4  # of the float model's finetuning; not tuned
_SCRATCH_LR = 1e-3  # of a small model trained from scratch; not tuned


def digest_of(described: list) -> str:
    """Names what depends on these settings."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def compute_type(config: RunConfig) -> str:
    """The type that rows compute in on this machine: where ``train.precision`` is auto, not the same on all."""
    from mbdist.train.environment import choose_device, compute_dtype

    return str(compute_dtype(config.train.precision, choose_device(config.cluster))).removeprefix("torch.")


def measure_run(config: RunConfig) -> dict:
    """Convert, finetune for ``train.steps`` and measure."""
    return _finetune(config, one_process_trainer(config))


def measure_straight_through(config: RunConfig) -> dict:
    """The same with latent weights of the last plane, a straight-through estimator and AdamW, in the reconstruction of
    blocks and in finetuning."""
    from mbdist.bench.straight_through import StraightThrough
    from mbdist.model.layers import convertible_layers, linear_weight

    layers = convertible_layers(_load_float(config), config.convert.include, config.convert.exclude)
    weights = {name: linear_weight(layer) for name, layer in layers.items()}
    config = config.model_copy(update={"run_dir": f"{config.run_dir}-latents"})  # its conversion is its own
    return _finetune(config, one_process_trainer(config, partial(StraightThrough, weights=weights)))


def _finetune(config: RunConfig, trainer) -> dict:
    from mbdist.model.layers import boolean_layers

    seconds = []
    trainer.engine.module.train()
    for step in range(config.train.steps):
        started = time.perf_counter()
        trainer.step(step)
        seconds.append(time.perf_counter() - started)
    planes = {layer.num_planes for _, layer in boolean_layers(trainer.engine.module)}
    state = trainer.state_bytes_per_weight() if seconds else None
    trainer.engine.module.eval()
    return {
        "planes": planes.pop() if len(planes) == 1 else None,
        "bits": trainer.bits_per_weight,
        **_measure(config, trainer.engine.module, trainer.corpus.eval),
        "state_bytes_per_weight": state,
        "step_s": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "tokens": _trained_tokens(config),
    }


def _trained_tokens(config: RunConfig) -> int:
    """Tokens of all steps, those of the blocks' reconstruction included."""
    from mbdist.data.calibration import BATCH_TOKENS

    reconstruction = config.convert.reconstruction.steps * BATCH_TOKENS if config.convert.reconstructs else 0
    return reconstruction + config.train.steps * config.tokens_per_step


def measure_float(config: RunConfig) -> dict:
    """The float model as it is."""
    return _measure_dense(config, _load_float(config), 16.0)


def measure_finetuned_float(config: RunConfig) -> dict:
    """The float model, every weight of it finetuned on the same tokens: next-token loss, AdamW, the same schedule."""
    model, seconds = _finetuned_float(config, config.train.steps)
    return {
        **_measure_dense(config, model, 16.0),
        "state_bytes_per_weight": 16.0,
        "step_s": sorted(seconds)[len(seconds) // 2],
        "tokens": len(seconds) * config.tokens_per_step,
    }


def _finetuned_float(config: RunConfig, steps: int) -> tuple[nn.Module, list[float]]:
    _set_up(config)
    model = _load_float(config).train()
    return model, train_dense(config, model, steps, _FLOAT_LR)


def measure_adapted_run(config: RunConfig, steps: int) -> dict:
    """The float model is taught the text for so many steps, in a folder that rows share; then it is converted,
    finetuned, as its own teacher, and measured."""
    sections = {"seed": True, "model": True, "data": {"train", "window"}, "floats": {"warmup_fraction"}}
    batches = {"sequences_per_step", "micro_batch", "max_grad_norm"}
    taught_by = [steps, config.model_dump(include=sections | {"train": batches})]
    folder = Path(config.run_dir).parent / f"adapted-{digest_of(taught_by)}"
    if not folder.exists():
        in_own_process(_adapt, config, steps, folder)
    model_config = ModelConfig(path=str(folder))
    found = measure_run(config.model_copy(update={"model": model_config, "run_dir": f"{config.run_dir}-adapted"}))
    return {**found, "tokens": found["tokens"] + steps * config.tokens_per_step}


def _adapt(config: RunConfig, steps: int, folder: Path) -> dict:
    from mbdist.model.loading import load_tokenizer
    from mbdist.model.saving import save_model

    model, _ = _finetuned_float(config, steps)
    save_model(model.eval(), load_tokenizer(config.model), folder)
    return {}


def make_gpt2(config: RunConfig, folder: Path) -> dict:
    """A small GPT-2 with the configured model's tokenizer, trained from scratch on the training text for thrice the
    steps of a finetuning, a few minutes as configured, in ``folder``."""
    import transformers

    from mbdist.model.loading import load_tokenizer
    from mbdist.model.saving import save_model

    _set_up(config)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    special = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"n_layer": 8, "n_embd": 384, "n_head": 6, "n_positions": config.data.window}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **shape, **special))
    train_dense(config, model.train(), 3 * config.train.steps, _SCRATCH_LR)
    save_model(model.eval(), tokenizer, folder)
    return {}


def train_dense(config: RunConfig, model: nn.Module, steps: int, lr: float) -> list[float]:
    """Next-token loss, AdamW, the run's schedule and batches; the seconds of every step."""
    from mbdist.data import Batches
    from mbdist.loss import token_loss
    from mbdist.model.readout import reader_of
    from mbdist.train.environment import compute_dtype

    corpus = _corpus(config)
    batches = Batches(corpus.train, config.seed, config.train.sequences_per_step, config.train.micro_batch, 0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    loss_config = config.loss.model_copy(update={"teacher": "none", "hidden": "none", "cross_entropy_weight": 1.0})
    device = torch.device("cpu")
    read_model = reader_of(model, device, compute_dtype(config.train.precision, device))
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        micro_batches = [batches.micro_batch_at(step, a) for a in range(config.accumulation)]
        targets = sum(int(batch.learned[:, 1:].sum()) for batch in micro_batches)
        for batch in micro_batches:
            read = partial(
                token_loss,
                lesson=None,
                input_ids=batch.input_ids,
                learned=batch.learned,
                config=loss_config,
                num_targets=targets,
                num_sequences=config.train.sequences_per_step,
            )
            read_model(batch.input_ids, read)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, config.floats.warmup_fraction)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure_round_to_nearest(config: RunConfig, bits: int, group: int) -> dict:
    """Uniform integers in groups, rounded to nearest."""
    return _uniform(config, bits, group, lambda weight, _gram: round_to_nearest(weight, bits, group), False)


def measure_gptq(config: RunConfig, bits: int, group: int) -> dict:
    """Uniform integers in groups by GPTQ, calibrated as our start is, one block after the other as GPTQ does."""
    return _uniform(config, bits, group, lambda weight, gram: gptq(weight, gram, bits, group), True)


def _uniform(config: RunConfig, bits: int, group: int, quantize: Callable, calibrated: bool) -> dict:
    from mbdist.convert.aside import Aside
    from mbdist.convert.blocks import ModelBlocks
    from mbdist.convert.calibration import BlockCalibration, BlockWalk
    from mbdist.data.calibration import calibration_batches
    from mbdist.model.layers import convertible_layers, linear_weight
    from mbdist.train.environment import compute_dtype

    _set_up(config)
    model = _load_float(config)
    layers = convertible_layers(model, config.convert.include, config.convert.exclude)
    blocks: Iterable[BlockCalibration] = [BlockCalibration(None, list(layers), {})]
    with tempfile.TemporaryDirectory() as folder:
        if calibrated:
            batches = calibration_batches(_corpus(config).train, config.convert.calibration_tokens)
            dtype = compute_dtype(config.train.precision, torch.device("cpu"))
            parts = ModelBlocks(model, layers, batches, dtype, Aside(Path(folder)))
            blocks = BlockWalk(parts, sequential=True)
        for block in blocks:
            for name in block.layers:
                weight = linear_weight(layers[name])  # a view: writing to it changes the layer
                weight.copy_(quantize(weight.clone(), block.grams.get(name)))
    return {**_measure_dense(config, model, uniform_bits(bits, group)), "planes": None}


def _set_up(config: RunConfig) -> None:
    from mbdist.train.environment import set_up_worker

    set_up_worker(config)


def _load_float(config: RunConfig) -> nn.Module:
    from mbdist.model.loading import load_model

    return load_model(config.model)


def _corpus(config: RunConfig):
    from mbdist.data import load_corpus
    from mbdist.model.loading import load_tokenizer

    return load_corpus(config.data, load_tokenizer(config.model))


def _measure_dense(config: RunConfig, model: nn.Module, bits: float) -> dict:
    found = _measure(config, model.eval(), _corpus(config).eval)
    return {"planes": None, "bits": bits, **found, "state_bytes_per_weight": None, "step_s": None, "tokens": 0}


def _measure(config: RunConfig, model: nn.Module, windows) -> dict:
    """Perplexity on all windows, KL to the float model on the first ones."""
    from mbdist.comm.communicator import Communicator
    from mbdist.model.readout import reader_of
    from mbdist.train.environment import choose_device, compute_dtype
    from mbdist.train.evaluate import evaluate
    from mbdist.train.teachers import LiveTeacher

    device = choose_device(config.cluster)
    dtype = compute_dtype(config.train.precision, device)

    batch, communicator = config.train.eval_batch, Communicator()
    student = reader_of(model, device, dtype)
    known = min(_KL_WINDOWS, len(windows))
    teacher = _load_float(config).to(device, dtype).eval()
    teach = LiveTeacher(teacher, device, dtype).teach
    near = evaluate(student, windows.select(range(known)), batch, communicator, device, teach)
    logs = math.log(near.perplexity) * known
    if known < len(windows):
        far = evaluate(student, windows.select(range(known, len(windows))), batch, communicator, device)
        logs += math.log(far.perplexity) * (len(windows) - known)
    return {"perplexity": math.exp(logs / len(windows)), "kl": near.kl}

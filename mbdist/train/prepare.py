"""What a run needs before its workers compute together: the converted model and the tokenised data.

Rank 0 prepares, outside any collective (tokenising a large corpus outlasts a collective's timeout); the others wait for
the marker that it leaves. A marker of an earlier run with the same settings is as good.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mbdist.config.model import ModelConfig
from mbdist.config.schema import RunConfig
from mbdist.convert import Conversion, bits_per_weight
from mbdist.data import Corpus, load_corpus
from mbdist.data.calibration import calibration_batches
from mbdist.data.windows import load_windows
from mbdist.errors import UserError
from mbdist.model.hashing import fingerprint_files
from mbdist.model.loading import (
    check_window,
    is_multi_boolean,
    load_model_config,
    load_tokenizer,
    resolve_path,
)
from mbdist.optim import BooleanOptimizer, OptimizerOfBits
from mbdist.train.environment import compute_dtype
from mbdist.train.metrics import MetricsWriter
from mbdist.train.teacher_cache import CachedTeacher


def student_source(config: RunConfig) -> ModelConfig:
    """The multi-Boolean model that training starts from."""
    if is_multi_boolean(config.model):
        return config.model
    return ModelConfig(path=str(Path(config.run_dir) / "converted"), trust_remote_code=config.model.trust_remote_code)


def teacher_source(config: RunConfig) -> ModelConfig | None:
    """The model to distil from, if any. None too where it is cached and the config does not name it."""
    if config.loss.teacher == "none":
        return None
    if config.loss.teacher_model is not None:
        return config.loss.teacher_model
    if is_multi_boolean(config.model):
        if config.loss.teacher == "cached":
            return None
        raise UserError(
            f"{config.model.path} is multi-Boolean, so it cannot be its own float teacher: "
            "name the float model in loss.teacher_model.path, or set loss.teacher to none"
        )
    return config.model


def prepare(
    config: RunConfig,
    metrics: MetricsWriter,
    optimizer: OptimizerOfBits = BooleanOptimizer,
    between: Callable[[], None] = lambda: None,  # called whenever there is progress; may raise, to stop there
) -> None:
    """Tokenise and convert, unless an earlier run with the same settings did."""
    teacher = teacher_source(config)  # a contradiction here is better found before the work than after
    marker, key = Path(config.run_dir) / "prepared.json", preparation_key(config)
    if _is_prepared(config, key):
        _check_length(config, json.loads(marker.read_text())["train_windows"])
        metrics.write("prepared", reused=True)
        return
    marker.unlink(missing_ok=True)
    check_window(config.data.window, load_model_config(config.model), "data.window")
    tokenizer = load_tokenizer(config.model)
    conversion = None
    if student_source(config) is not config.model:
        dtype = compute_dtype(config.train.precision, torch.device("cpu"))
        folder = Path(config.run_dir) / "converted"
        conversion = Conversion(
            config.model, folder, config.convert, dtype, optimizer=optimizer, replace=True, between=between
        )
    metrics.write("tokenizing")
    corpus = load_corpus(config.data, tokenizer, between)
    _check_length(config, len(corpus.train))
    if config.loss.teacher == "cached":
        CachedTeacher(config, corpus.train, teacher, torch.device("cpu"))  # raises what is wrong with it
    metrics.write("tokenized", train_windows=len(corpus.train), eval_windows=len(corpus.eval))
    if conversion is not None:
        _convert(conversion, config, tokenizer, corpus, metrics, between)
    marker.write_text(json.dumps({"key": key, "train_windows": len(corpus.train)}))


def _check_length(config: RunConfig, train_windows: int) -> None:
    if train_windows < config.train.sequences_per_step:
        raise UserError(
            f"the training data fills {train_windows} windows, less than the {config.train.sequences_per_step} "
            "sequences of one step: give more text, a smaller data.window or train.sequences_per_step"
        )


def wait_until_prepared(config: RunConfig, between: Callable[[], None]) -> None:
    """For ranks other than 0. If rank 0 fails, whoever started the ranks ends them all."""
    key = preparation_key(config)
    while not _is_prepared(config, key):
        between()
        time.sleep(0.2)


def _convert(
    conversion: Conversion,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    metrics: MetricsWriter,
    between: Callable[[], None],
) -> None:
    if conversion.loads_whole:
        metrics.write("loading", model=config.model.path)
    bits, init = config.convert.bits, config.convert.init
    goal = f"{config.convert.planes} planes" if bits is None else f"{bits} bits a weight"
    metrics.write("converting", goal=goal, init=init)
    calibration = []
    if config.convert.needs_calibration:
        source = config.convert.calibration
        # the training text named again: still without what is held out of it
        same = source in (None, config.data.train)
        windows = corpus.train if same else load_windows(source, config.data, tokenizer, between)
        calibration = calibration_batches(windows, config.convert.calibration_tokens)
    reports = []
    for report in conversion.run(calibration, tokenizer):
        reports.append(report)
        metrics.write("converted_layer", name=report.name, done=len(reports), layers=len(conversion.layers))
        between()
    metrics.write(
        "converted",
        layers=len(reports),
        planes={report.name: report.planes for report in reports},
        bits_per_weight=bits_per_weight(reports),
        mean_relative_error=sum(report.relative_error for report in reports) / len(reports),
        relative_error={report.name: round(report.relative_error, 5) for report in reports},
        output_error={report.name: report.output_error for report in reports if report.output_error is not None},
        moves_per_weight={
            report.name: round(report.moves_per_weight, 5) for report in reports if report.moves_per_weight is not None
        },
    )


def preparation_settings(config: RunConfig) -> list[dict]:
    """The settings that preparation depends on."""
    data = config.data.model_dump(exclude={"max_eval_windows", "cache_dir"})
    return [config.model.model_dump(), config.convert.model_dump(), data]


def preparation_key(config: RunConfig) -> str:
    """Identifies the settings that preparation depends on, and the files of a local model, on whatever machine."""
    folder = Path(resolve_path(config.model.path))
    files = fingerprint_files(file for file in folder.glob("*.*") if file.is_file())
    described = [preparation_settings(config), files]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _is_prepared(config: RunConfig, key: str) -> bool:
    try:
        marked = json.loads((Path(config.run_dir) / "prepared.json").read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False
    return marked and (is_multi_boolean(config.model) or is_multi_boolean(student_source(config)))

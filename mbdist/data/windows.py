"""Documents joined and cut into windows of equal length; tokenised once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from mbdist.config.data import DataConfig, DataSource
from mbdist.data.sources import files_of, load_documents
from mbdist.data.tokens import tokenize
from mbdist.errors import UserError
from mbdist.whole_files import replaced_folder

_FORMAT = 1  # of the cached windows; part of their key


@dataclass(frozen=True)
class Corpus:
    """Training and held-out windows. Columns: input_ids (window,) int32; learned (window,) bool."""

    train: datasets.Dataset
    eval: datasets.Dataset


def load_corpus(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    between: Callable[[], None] = lambda: None,  # called before every document; may raise, to stop there
) -> Corpus:
    """Windows of the config's data; from the cache where the same text met the same tokenizer before."""
    train = load_windows(config.train, config, tokenizer, between)
    if config.eval is not None:
        held_out = load_windows(config.eval, config, tokenizer, between)
    else:
        count = max(1, round(len(train) * config.eval_fraction))
        if count >= len(train):
            raise UserError(
                f"the training data fills {len(train)} window(s) of {config.window} tokens: too little to hold out "
                f"{config.eval_fraction:.0%}; give data.eval, more text or a smaller data.window"
            )
        held_out = train.select(range(len(train) - count, len(train)))
        train = train.select(range(len(train) - count))
    if config.max_eval_windows is not None:
        held_out = held_out.select(range(min(config.max_eval_windows, len(held_out))))
    return Corpus(train.with_format("torch"), held_out.with_format("torch"))


def load_windows(
    source: DataSource,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    between: Callable[[], None] = lambda: None,
) -> datasets.Dataset:
    """All windows of one source."""
    root = Path(config.cache_dir) if config.cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "mbdist"
    folder = root / _key(source, config.window, tokenizer)
    if not folder.is_dir():
        windows = _cut_windows(source, config.window, tokenizer, between)
        with replaced_folder(folder) as target:
            windows.save_to_disk(target)
    return datasets.load_from_disk(str(folder))


def digest_of_windows(windows: datasets.Dataset) -> str:
    """SHA-256 of the tokens of all windows."""
    digest = hashlib.sha256(f"{len(windows)}".encode())
    for rows in windows.select_columns("input_ids").with_format("numpy").iter(1024):
        digest.update(np.ascontiguousarray(rows["input_ids"], np.int32))
    return digest.hexdigest()


def _key(source: DataSource, window: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies text, tokenizer and window; a file counts with its path, size and time of change, Python's own
    documentation with Python's version."""
    files = [(str(path.resolve()), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files_of(source)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    described = [
        _FORMAT,
        sys.version_info[:2],
        source.model_dump(),
        files,
        window,
        rules,
        tokenizer.chat_template,
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


def _cut_windows(
    source: DataSource, window: int, tokenizer: PreTrainedTokenizerBase, between: Callable[[], None]
) -> datasets.Dataset:
    ids: list[int] = []
    learned: list[bool] = []
    for document in load_documents(source):
        between()
        tokens, marks = tokenize(document, tokenizer)
        ids += tokens
        learned += marks
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            learned.append(bool(marks and marks[-1]))
    count = len(ids) // window
    if count == 0:
        raise UserError(
            f"the {source.type} data holds {len(ids)} tokens, less than one window of {window}; "
            "give more text or a smaller data.window"
        )
    if not any(learned):
        raise UserError(f"no token of the {source.type} data is to be learned: the chats have no assistant turns")
    return datasets.Dataset.from_dict(
        {
            "input_ids": np.asarray(ids[: count * window], np.int32).reshape(count, window),
            "learned": np.asarray(learned[: count * window]).reshape(count, window),
        },
        features=datasets.Features(
            input_ids=datasets.List(datasets.Value("int32"), window),
            learned=datasets.List(datasets.Value("bool"), window),
        ),
    )

"""Writing a finished model so that an interrupted write never costs the one that was there before."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mbdist.errors import UserError


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside ``target``; it takes target's place only once everything is written and synced.

    Raises UserError where the disk is full or the place cannot be written; whatever was at ``target`` stays whole.
    """
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with clear_disk_errors(target):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def clear_disk_errors(target: Path) -> Iterator[None]:
    """Turns what writing ``target`` may end in, a full disk say, into one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        kept = "; the previous save is unharmed" if target.exists() else ""
        raise UserError(f"cannot save to {target}: {getattr(error, 'strerror', None) or error}{kept}") from error


def put_in_place(beside: Path, target: Path) -> None:
    """Sync a folder and rename it to ``target``, whose place it takes."""
    for file in beside.rglob("*"):
        if file.is_file():
            fsync(file)
    retired = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(retired)
    try:
        beside.rename(target)
    except BaseException:
        if retired.exists():
            retired.rename(target)
        raise
    fsync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` loads: weights, config, tokenizer and chat template."""
    with replaced_folder(folder) as target:
        # Names are the model's own: some architectures have others in their files, and experts in one tensor each.
        model.save_pretrained(target, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def save_gathered_model(
    model: PreTrainedModel,  # multi-Boolean; its parameters may be anywhere
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    layout: dict[str, torch.Tensor],  # all tensors to write, on the meta device
    state: Iterable[tuple[str, torch.Tensor]],  # the same, with their content, as they become known
    shard_bytes: int = 2 << 30,
) -> None:
    """As ``save_model``, with no more than a shard (or a single tensor that is larger) in memory at a time."""
    plan = split_torch_state_dict_into_shards(
        layout, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    with replaced_folder(folder) as target:
        model.hf_quantizer.without_weights = True
        try:
            model.save_pretrained(target)
        finally:
            model.hf_quantizer.without_weights = False
        shards: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in state:
            file = plan.tensor_to_filename[name]
            shards[file][name] = tensor
            if len(shards[file]) == len(plan.filename_to_tensors[file]):
                save_file(shards.pop(file), target / file, metadata={"format": "pt"})
                fsync(target / file)  # here, so that the end does not wait for all of a large model
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (target / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def fsync(path: Path) -> None:
    """Have a file, or the entries of a folder, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, content: bytes) -> None:
    """Beside first, then renamed: a reader finds all of it or nothing."""
    beside = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(content)
        fsync(beside)
        beside.rename(file)
    finally:
        beside.unlink(missing_ok=True)

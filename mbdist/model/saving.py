"""Writing a finished model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mbdist.whole_files import fsync, replaced_folder


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

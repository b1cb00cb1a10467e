"""A model that does not train, partitioned by ZeRO-3 over the ranks: each holds its part, blocks are gathered as the
forward pass comes to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from mbdist.engine.deepspeed_config import largest_block

_SMALL_ROWS = 4  # times the hidden size: norms and biases of fewer elements stay whole, gathering them costs more


class PartitionedModel:
    """Under DeepSpeed without an optimizer. All ranks call its methods together."""

    def __init__(self, load: Callable[[], PreTrainedModel], dtype: torch.dtype):
        """``load`` makes the model. A float one materialises partitioned: rank 0 alone reads its weights, a layer at a
        time. A packed one is loaded whole by every rank first."""
        settings = _settings(dtype)
        loading = HfDeepSpeedConfig(settings)  # transformers looks for the one that is alive
        try:
            model = load()
        finally:
            unset_hf_deepspeed_config()
            del loading
        settings["bf16"] = {"enabled": False}  # what was loaded stays as it is: scales of a packed model are fp32
        zero = settings["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = _SMALL_ROWS * model.config.get_text_config().hidden_size
        block = largest_block(model.named_parameters())
        zero["stage3_prefetch_bucket_size"] = block
        zero["stage3_max_live_parameters"] = 3 * block
        zero["stage3_max_reuse_distance"] = block
        self.engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=settings)
        self.engine.eval()

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def forward(self, **inputs):
        return self.engine(**inputs)

    def gathered(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """While it is open, the parameters of one module are whole on every rank."""
        return deepspeed.zero.GatheredParameters(list(module.parameters()))


def _settings(dtype: torch.dtype) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": dtype == torch.bfloat16},  # what zero.Init makes of parameters
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 2**62,
            "memory_efficient_linear": False,  # would replace torch's own linear, in the whole process
        },
        "comms_logger": {"enabled": False},
    }

"""A model that does not train, partitioned by ZeRO-3 over the ranks: each holds its part, blocks are gathered as the
forward pass comes to them."""

from __future__ import annotations

import contextlib

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from mbdist.config.model import ModelConfig
from mbdist.engine.deepspeed_config import largest_block, one_block_ahead
from mbdist.engine.placement import place_partitioned
from mbdist.model.layers import is_scale
from mbdist.model.loading import empty_model, is_multi_boolean, load_model
from mbdist.model.weights import WeightFiles

_SMALL_ROWS = 4  # times the hidden size: norms and biases of fewer elements stay whole, gathering them costs more


class PartitionedModel:
    """Under DeepSpeed without an optimizer. All ranks call its methods together."""

    def __init__(self, source: ModelConfig, dtype: torch.dtype, device: torch.device):
        """It materialises partitioned. Of a float model rank 0 alone reads the weights, a layer at a time; of a packed
        one every rank reads its own ranges. Raises UserError where it cannot be loaded."""
        settings = _settings(dtype)
        packed = is_multi_boolean(source)
        model = _packed(source, settings, dtype, device) if packed else _float(source, settings, dtype)
        settings["bf16"] = {"enabled": False}  # what was loaded stays as it is: scales of a packed model are fp32
        zero = settings["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = _SMALL_ROWS * model.config.get_text_config().hidden_size
        zero |= one_block_ahead(largest_block(model.named_parameters()))
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


def _float(source: ModelConfig, settings: dict, dtype: torch.dtype) -> PreTrainedModel:
    loading = HfDeepSpeedConfig(settings)  # transformers looks for the one that is alive
    try:
        return load_model(source, dtype)
    finally:
        unset_hf_deepspeed_config()
        del loading


def _packed(source: ModelConfig, settings: dict, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Floats in ``dtype``, but for the scales, which stay fp32."""
    model = empty_model(source)
    weights = WeightFiles(source, model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_scale(name):
            parameter.data = parameter.data.to(dtype)
    place_partitioned(model, weights, settings, device)
    return model


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

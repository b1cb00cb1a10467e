"""The models of a run as their configs describe them, in fake tensors: sizes of everything, no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mbdist.config.schema import ModelConfig, RunConfig
from mbdist.model.layers import convertible_layers, linear_shape, replace_module
from mbdist.model.linear import MultiBooleanLinear
from mbdist.model.loading import check_window, is_multi_boolean, load_model_config
from mbdist.train.prepare import teacher_source
from mbdist.train.trainer import choose_trained_floats


@dataclass(frozen=True)
class PlannedModel:
    """What plans need to know of a run's models. To be used under ``with_fake_tensors``."""

    config: RunConfig
    architecture: PreTrainedConfig
    planes: dict[str, int] | None  # by layer, where the model is multi-Boolean already
    teacher: PreTrainedConfig | None

    @property
    def vocabulary(self) -> int:
        return self.architecture.get_text_config(decoder=True).vocab_size

    def student(self, dtype: torch.dtype) -> PreTrainedModel:
        """Multi-Boolean, with what trains requiring gradients, frozen floats in ``dtype``."""
        model = _fake_model(self.architecture, dtype, self.config.model)
        convert = self.config.convert
        layers = {
            name: model.get_submodule(name)
            for name in self.planes or convertible_layers(model, convert.include, convert.exclude)
        }
        everywhere = convert.planes if convert.bits is None else min(convert.max_planes, math.ceil(convert.bits))
        for name, original in layers.items():
            out_features, in_features = linear_shape(original)
            planes = self.planes[name] if self.planes else everywhere
            bias = original.bias is not None
            replace_module(model, name, MultiBooleanLinear(in_features, out_features, planes, bias, dtype=dtype))
        choose_trained_floats(model, self.config.floats.also_train, dtype)
        return model

    def teacher_bytes(self, dtype: torch.dtype) -> int:
        """Of the whole teacher; 0 where there is none."""
        if self.teacher is None:
            return 0
        source = self.config.loss.teacher_model or self.config.model
        return sum(parameter.nbytes for parameter in _fake_model(self.teacher, dtype, source).parameters())


def planned_model(config: RunConfig) -> PlannedModel:
    """Reads the config files of the models, nothing else. Raises UserError where they cannot be had."""
    architecture = load_model_config(config.model)
    check_window(config.data.window, architecture, "data.window")
    planes = architecture.quantization_config["planes"] if is_multi_boolean(config.model) else None
    source = teacher_source(config)
    return PlannedModel(config, architecture, planes, load_model_config(source) if source is not None else None)


def _fake_model(architecture: PreTrainedConfig, dtype: torch.dtype, source: ModelConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(architecture, dtype=dtype, trust_remote_code=source.trust_remote_code)

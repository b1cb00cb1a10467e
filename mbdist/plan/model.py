"""The models of a run as their configs describe them, in fake tensors: sizes of everything, no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mbdist.config.convert import ConvertConfig
from mbdist.config.model import ModelConfig
from mbdist.config.schema import RunConfig
from mbdist.convert.allocation import allocate, plane_bits
from mbdist.model.layers import convertible_layers, linear_shape, put_empty_layers
from mbdist.model.loading import check_window, load_causal_config
from mbdist.model.quantizer import QUANT_METHOD
from mbdist.train.prepare import teacher_source
from mbdist.train.trained_floats import choose_trained_floats


@dataclass(frozen=True)
class PlannedModel:
    """What plans need to know of a run's models. To be used under ``with_fake_tensors``."""

    config: RunConfig
    architecture: PreTrainedConfig
    planes: dict[str, int]  # by layer, of a model that is multi-Boolean already
    teacher: PreTrainedConfig | None

    def with_config(self, config: RunConfig) -> PlannedModel:
        """The same models under other settings; no teacher where they keep none in memory."""
        return replace(self, config=config, teacher=self.teacher if config.loss.teacher == "float" else None)

    def student(self, dtype: torch.dtype) -> PreTrainedModel:
        """Multi-Boolean, with what trains requiring gradients, frozen floats in ``dtype``."""
        model = _fake_model(self.architecture, dtype, self.config.model)
        put_empty_layers(model, self.planes or _planned_planes(model, self.config.convert))
        choose_trained_floats(model, self.config.floats.also_train, dtype)
        return model

    def teacher_model(self, dtype: torch.dtype) -> PreTrainedModel | None:
        """Float or packed; None where none is in memory."""
        if self.teacher is None:
            return None
        model = _fake_model(self.teacher, dtype, self.config.loss.teacher_model or self.config.model)
        put_empty_layers(model, _planes_of(self.teacher))
        return model


def planned_model(config: RunConfig, student: ModelConfig | None = None) -> PlannedModel:
    """Reads the config files of the models, nothing else; ``student``: of the multi-Boolean model, once it is there.
    Raises UserError where they cannot be had."""
    architecture = load_causal_config(student or config.model)
    check_window(config.data.window, architecture, "data.window")
    source = teacher_source(config) if config.loss.teacher == "float" else None
    teacher = load_causal_config(source) if source is not None else None
    return PlannedModel(config, architecture, _planes_of(architecture), teacher)


def _planned_planes(model: PreTrainedModel, convert: ConvertConfig) -> dict[str, int]:
    """Planes by layer of a model that is to be converted. A budget of bits is spread evenly: which matrices get more is
    not known before the text is looked at."""
    shapes = {
        name: linear_shape(layer) for name, layer in convertible_layers(model, convert.include, convert.exclude).items()
    }
    if convert.bits is None:
        return dict.fromkeys(shapes, convert.planes)
    even = {name: [plane_bits(shape) / 4**k for k in range(convert.max_planes)] for name, shape in shapes.items()}
    return allocate(even, shapes, convert.bits, per_bit=True)


def _planes_of(architecture: PreTrainedConfig) -> dict[str, int]:
    """Planes by layer of a multi-Boolean model; none of a float one."""
    quantization = getattr(architecture, "quantization_config", None) or {}
    return quantization["planes"] if quantization.get("quant_method") == QUANT_METHOD else {}


def _fake_model(architecture: PreTrainedConfig, dtype: torch.dtype, source: ModelConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(architecture, dtype=dtype, trust_remote_code=source.trust_remote_code)

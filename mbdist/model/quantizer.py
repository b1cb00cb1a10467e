"""transformers' extension points: ``AutoModelForCausalLM.from_pretrained`` reads a multi-Boolean folder as it stands.

config.json of such a folder carries ``quantization_config: {quant_method: mbdist, planes: {module name: K, ...}}``.
"""

from __future__ import annotations

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mbdist.model.layers import put_empty_layers
from mbdist.model.shared_input import share_inputs

QUANT_METHOD = "mbdist"


@register_quantization_config(QUANT_METHOD)
class MultiBooleanConfig(QuantizationConfigMixin):
    """Which modules are multi-Boolean, and with how many planes."""

    def __init__(self, planes: dict[str, int] | None = None, **_ignored):
        self.quant_method = QUANT_METHOD
        self.planes = dict(planes or {})


@register_quantizer(QUANT_METHOD)
class MultiBooleanQuantizer(HfQuantizer):
    """Puts empty multi-Boolean layers where the checkpoint has planes; the loader then fills them as any parameter."""

    quantization_config: MultiBooleanConfig
    requires_calibration = True  # a float model is converted by `mbdist convert`, not on loading

    def _process_model_before_weight_loading(self, model, **kwargs):
        with torch.device("meta"):
            put_empty_layers(model, self.quantization_config.planes)
        # Scales are masters: they stay fp32 whatever dtype the rest of the model is loaded in.
        model._keep_in_fp32_modules_strict.update({"scale_out", "scale_in"})
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        share_inputs(model)
        return model

    without_weights = False  # while a model is saved whose weights are written by others

    def get_state_dict_and_metadata(self, model):
        # save_pretrained asks here, and forgets the state_dict it was given, for every model with a quantizer.
        return {} if self.without_weights else None, {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True

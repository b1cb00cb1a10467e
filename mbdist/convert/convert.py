"""Replaces the linear layers of a model in place, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.config.schema import ConvertConfig
from mbdist.convert.calibrated import calibrated
from mbdist.convert.calibration import LayerStatistics, calibrate
from mbdist.convert.joint import joint
from mbdist.convert.planes import PlaneSet
from mbdist.convert.svid import svid
from mbdist.errors import UserError
from mbdist.model.layers import convertible_layers, replace_module
from mbdist.model.linear import MultiBooleanLinear
from mbdist.model.quantizer import MultiBooleanConfig, MultiBooleanQuantizer

# (weight (m, n), num_planes, moments of the layer where they were collected) -> planes and scales
Initialization = Callable[[torch.Tensor, int, LayerStatistics | None], PlaneSet]

INITIALIZATIONS: dict[str, Initialization] = {
    "svid": lambda weight, num_planes, _: svid(weight, num_planes),
    "joint": lambda weight, num_planes, _: joint(weight, num_planes),
    "calibrated": calibrated,
}
NEED_CALIBRATION = {"calibrated"}


@dataclass(frozen=True)
class LayerReport:
    """One line of the conversion table."""

    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    planes: int
    relative_error: float  # ||W - W_hat||^2 / ||W||^2


def convert_model(
    model: PreTrainedModel,
    config: ConvertConfig,
    calibration: Iterable[
        torch.Tensor
    ] = (),  # batches of token ids (batch, window), for initialisations that need them
) -> Iterator[LayerReport]:
    """Convert the chosen layers in place, yielding a report after each; the model can be saved once it is exhausted."""
    initialize = INITIALIZATIONS[config.init]
    chosen = convertible_layers(model, config.include, config.exclude)
    statistics = calibrate(model, chosen, calibration) if config.init in NEED_CALIBRATION else {}
    for name, original in chosen.items():
        weight = original.weight.detach()
        if not isinstance(original, nn.Linear):  # Conv1D keeps (in, out)
            weight = weight.T
        if not torch.isfinite(weight).all():
            raise UserError(f"the weight of {name} holds NaN or infinity; the checkpoint is damaged")
        found = initialize(weight, config.planes, statistics.pop(name, None))
        replace_module(model, name, _layer_from(found, original.bias))
        yield LayerReport(name, tuple(weight.shape), config.planes, found.relative_error(weight))
    quantization = MultiBooleanConfig(planes=dict.fromkeys(chosen, config.planes))
    model.config.quantization_config = quantization
    model.hf_quantizer = MultiBooleanQuantizer(quantization)
    model.is_quantized = True


def _layer_from(found: PlaneSet, bias: torch.Tensor | None) -> MultiBooleanLinear:
    num_planes, out_features = found.scale_out.shape
    in_features = found.scale_in.shape[1]
    layer = MultiBooleanLinear(in_features, out_features, num_planes, bias is not None, device="meta")
    for k, plane in enumerate(found.planes):
        setattr(layer, f"plane_{k}", nn.Parameter(plane, requires_grad=False))
    layer.scale_out = nn.Parameter(found.scale_out)
    layer.scale_in = nn.Parameter(found.scale_in)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer

"""Replaces the linear layers of a model in place, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.config.schema import ConvertConfig
from mbdist.convert.allocation import allocate, residual_errors, second_order_errors
from mbdist.convert.calibrated import calibrated
from mbdist.convert.calibration import BlockCalibration, BlockWalk, LayerMoments, squared_moments
from mbdist.convert.joint import joint
from mbdist.convert.planes import PlaneSet
from mbdist.convert.reconstruction import reconstruct
from mbdist.convert.svid import svid
from mbdist.errors import UserError
from mbdist.model.layers import convertible_layers, linear_shape, linear_weight, replace_module
from mbdist.model.linear import MultiBooleanLinear
from mbdist.model.quantizer import MultiBooleanConfig, MultiBooleanQuantizer

_SQUARED_BATCHES = 8  # of 2048 tokens: vectors need fewer than X^T X, and a backward pass costs more

# (weight (m, n), num_planes, moments of the layer where they were collected) -> planes and scales
Initialization = Callable[[torch.Tensor, int, LayerMoments | None], PlaneSet]

INITIALIZATIONS: dict[str, Initialization] = {
    "svid": lambda weight, num_planes, _: svid(weight, num_planes),
    "joint": lambda weight, num_planes, _: joint(weight, num_planes),
    "calibrated": calibrated,
}


@dataclass(frozen=True)
class LayerReport:
    """One line of the conversion table."""

    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    planes: int
    relative_error: float  # ||W - W_hat||^2 / ||W||^2
    output_error: float | None = None  # ||Y - Y_hat||^2 / ||Y||^2 of its block's outputs, where they are reconstructed


def convert_model(
    model: PreTrainedModel,
    config: ConvertConfig,
    calibration: Iterable[torch.Tensor] = (),  # batches of token ids (batch, window), where config.needs_calibration
    dtype: torch.dtype = torch.float32,  # of the calibration's passes through the model
) -> Iterator[LayerReport]:
    """Convert the chosen layers in place, yielding a report after each; the model can be saved once it is exhausted."""
    initialize = INITIALIZATIONS[config.init]
    chosen = convertible_layers(model, config.include, config.exclude)
    batches = list(calibration)
    moments = squared_moments(model, chosen, batches[:_SQUARED_BATCHES], dtype) if config.needs_calibration else {}
    planes = choose_planes(chosen, config, moments)
    blocks: Iterable[BlockCalibration] = [BlockCalibration(list(chosen), {})]
    if config.init == "calibrated":
        blocks = BlockWalk(model, chosen, batches, dtype, config.sequential, follow_both=config.reconstructs)
    for block in blocks:
        weights = {}
        for name in block.layers:
            original = chosen.pop(name)
            weight = linear_weight(original)
            if not torch.isfinite(weight).all():
                raise UserError(f"the weight of {name} holds NaN or infinity; the checkpoint is damaged")
            of_layer = moments.pop(name, None)
            if of_layer is not None:
                of_layer.gram = block.grams.pop(name, None)
            found = initialize(weight, planes[name], of_layer)
            replace_module(model, name, _layer_from(found, original.bias))
            if config.reconstructs and block.targets:
                weights[name] = weight
            else:
                yield LayerReport(name, tuple(weight.shape), planes[name], found.relative_error(weight))
        if weights:
            layers = {name: model.get_submodule(name) for name in weights}
            output_error = reconstruct(layers, block, config.reconstruction)
            for name, weight in weights.items():
                error = _planes_of(layers[name]).relative_error(weight)
                yield LayerReport(name, tuple(weight.shape), planes[name], error, output_error)
    quantization = MultiBooleanConfig(planes=planes)
    model.config.quantization_config = quantization
    model.hf_quantizer = MultiBooleanQuantizer(quantization)
    model.is_quantized = True


def choose_planes(
    layers: dict[str, nn.Module], config: ConvertConfig, moments: dict[str, LayerMoments]
) -> dict[str, int]:
    """Planes by layer: the same for all, or by allocation where a budget of bits is given."""
    if config.bits is None:
        return dict.fromkeys(layers, config.planes)
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    weights = sum(m * n for m, n in shapes.values())
    errors = {}
    for name, layer in layers.items():
        if config.allocation == "second_order":
            errors[name] = second_order_errors(linear_weight(layer), moments[name], config.max_planes)
        else:
            share = shapes[name][0] * shapes[name][1] / weights
            errors[name] = residual_errors(linear_weight(layer), share, config.max_planes)
    return allocate(errors, shapes, config.bits, per_bit=config.allocation == "second_order")


def _planes_of(layer: MultiBooleanLinear) -> PlaneSet:
    return PlaneSet([plane.data for plane in layer.planes], layer.scale_out.detach(), layer.scale_in.detach())


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

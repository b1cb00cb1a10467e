"""Replaces the linear layers of a model in place, one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.config.schema import ConvertConfig
from mbdist.convert.allocation import allocate, residual_errors, second_order_errors
from mbdist.convert.calibration import BlockCalibration, BlockWalk, LayerMoments, layers_by_block, squared_moments
from mbdist.convert.initialize import INITIALIZATIONS, Matrix, Spread, in_turn
from mbdist.convert.planes import PlaneSet
from mbdist.convert.reconstruction import reconstruct
from mbdist.errors import UserError
from mbdist.model.layers import convertible_layers, linear_shape, linear_weight, replace_module
from mbdist.model.linear import MultiBooleanLinear
from mbdist.model.quantizer import MultiBooleanConfig, MultiBooleanQuantizer
from mbdist.optim import BooleanOptimizer, OptimizerOfBits

_SQUARED_BATCHES = 8  # of 2048 tokens: vectors need fewer than X^T X, and a backward pass costs more


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
    spread: Spread = in_turn,  # of the matrices of a block, and of their rows, over processes
    optimizer: OptimizerOfBits = BooleanOptimizer,  # of a reconstruction
) -> Iterator[LayerReport]:
    """Convert the chosen layers in place, yielding a report after each; the model can be saved once it is exhausted."""
    initialize = INITIALIZATIONS[config.init]
    chosen = convertible_layers(model, config.include, config.exclude)
    batches = list(calibration)
    moments = squared_moments(model, chosen, batches[:_SQUARED_BATCHES], dtype) if config.needs_calibration else {}
    planes = choose_planes(chosen, config, moments, spread)
    blocks: Iterable[BlockCalibration] = [
        BlockCalibration(names, {}) for names in layers_by_block(model, chosen).values()
    ]
    if config.init == "calibrated":
        blocks = BlockWalk(model, chosen, batches, dtype, config.sequential, follow_both=config.reconstructs)
    for block in blocks:
        originals = {name: chosen.pop(name) for name in block.layers}
        matrices = []
        for name, original in originals.items():
            weight = linear_weight(original)
            if not torch.isfinite(weight).all():
                raise UserError(f"the weight of {name} holds NaN or infinity; the checkpoint is damaged")
            of_layer = moments.pop(name, None)
            if of_layer is not None:
                of_layer.gram = block.grams.pop(name, None)
            matrices.append(Matrix(weight, planes[name], of_layer))
        for (name, original), found in zip(originals.items(), initialize(matrices, spread), strict=True):
            replace_module(model, name, layer_from(found, original.bias))
        output_error = None
        if config.reconstructs and block.targets:
            layers = {name: model.get_submodule(name) for name in originals}
            output_error = reconstruct(layers, block, config.reconstruction, optimizer)
        for name, matrix in zip(originals, matrices, strict=True):
            error = planes_of(model.get_submodule(name)).relative_error(matrix.weight)
            yield LayerReport(name, tuple(matrix.weight.shape), planes[name], error, output_error)
    quantization = MultiBooleanConfig(planes=planes)
    model.config.quantization_config = quantization
    model.hf_quantizer = MultiBooleanQuantizer(quantization)
    model.is_quantized = True


def choose_planes(
    layers: dict[str, nn.Module], config: ConvertConfig, moments: dict[str, LayerMoments], spread: Spread = in_turn
) -> dict[str, int]:
    """Planes by layer: the same for all, or by allocation where a budget of bits is given."""
    if config.bits is None:
        return dict.fromkeys(layers, config.planes)
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    weights = sum(m * n for m, n in shapes.values())
    if config.allocation == "second_order":
        jobs = [(linear_weight(layer), moments[name], config.max_planes) for name, layer in layers.items()]
        errors = spread(second_order_errors, jobs)
    else:
        shares = (shapes[name][0] * shapes[name][1] / weights for name in layers)
        jobs = [(linear_weight(layer), p, config.max_planes) for layer, p in zip(layers.values(), shares, strict=True)]
        errors = spread(residual_errors, jobs)
    return allocate(
        dict(zip(layers, errors, strict=True)), shapes, config.bits, per_bit=config.allocation == "second_order"
    )


def planes_of(layer: MultiBooleanLinear) -> PlaneSet:
    return PlaneSet([plane.data for plane in layer.planes], layer.scale_out.detach(), layer.scale_in.detach())


def layer_from(found: PlaneSet, bias: torch.Tensor | None) -> MultiBooleanLinear:
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

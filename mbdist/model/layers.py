"""Finding and replacing the linear layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mbdist.errors import UserError
from mbdist.model.linear import MultiBooleanLinear


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` or GPT-2's ``Conv1D`` (the same layer with its weight stored transposed)."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a layer that ``is_linear`` accepts."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight (m, n) of a layer that ``is_linear`` accepts, without gradient: a view, transposed for ``Conv1D``."""
    weight = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def embedding_and_head(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The weights of a model's input embedding and of its LM head; None where it names no head."""
    return model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)


def convertible_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Linear layers by name, in model order. The LM head stays float, and so does a layer whose weight is shared.

    Raises UserError where nothing is left to convert.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    linear = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and owners[id(module.weight)] == 1
    }
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layers to convert besides its LM head")
    chosen = {
        name: module for name, module in linear.items() if _matches(name, include) and not _matches(name, exclude)
    }
    if not chosen:
        raise UserError(
            f"no linear layer is left by include={list(include)}, exclude={list(exclude)}; the model has "
            f"{', '.join(list(linear)[:3])}, ... ({len(linear)} in all)"
        )
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def put_empty_layers(model: nn.Module, planes: dict[str, int]) -> None:
    """Multi-Boolean layers without content, of so many ``planes`` by name, in the place of linear ones.

    Raises ValueError where a name is none of a linear layer.
    """
    for name, num_planes in planes.items():
        original = model.get_submodule(name)
        if not is_linear(original):
            raise ValueError(f"{name} is listed as multi-Boolean, but is a {type(original).__name__} in this model")
        out_features, in_features = linear_shape(original)
        bias, dtype = original.bias is not None, original.weight.dtype
        replace_module(model, name, MultiBooleanLinear(in_features, out_features, num_planes, bias, dtype=dtype))


def boolean_layers(model: nn.Module) -> Iterator[tuple[str, MultiBooleanLinear]]:
    """The multi-Boolean layers by name, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, MultiBooleanLinear):
            yield name, module


def is_scale(parameter_name: str) -> bool:
    """Whether a parameter of a model is the scales of a multi-Boolean layer."""
    return parameter_name.endswith((".scale_out", ".scale_in"))


def bits_per_weight(model: nn.Module) -> float:
    """Average bits a weight of the multi-Boolean layers: planes and fp32 scales counted, biases not."""
    bits = weights = 0
    for _, layer in boolean_layers(model):
        scales = layer.num_planes * (layer.in_features + layer.out_features)
        bits += layer.num_planes * layer.num_weights + 32 * scales
        weights += layer.num_weights
    return bits / weights

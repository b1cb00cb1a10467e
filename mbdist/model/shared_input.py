"""Layers that are given the same tensor, multiplied in one launch while few tokens are decoded.

Queries, keys and values take one input, gate and up another. Alone each of them costs a launch, and a small one is all
latency. Which layers belong together is seen in use, not read off their names: those that a module's forward called
with one and the same tensor are multiplied together when the first of them is called the next time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from mbdist.model.linear import MultiBooleanLinear, product_dtype
from mbdist_kernels import decodes, linear_decode_together


def share_inputs(model: nn.Module) -> None:
    """Let the multi-Boolean layers in each module of ``model`` be decoded together where they share an input."""
    for module in model.modules():
        layers = [child for child in module.children() if isinstance(child, MultiBooleanLinear)]
        if len(layers) > 1:
            shared = SharedInput()
            for layer in layers:
                layer.shared_input = shared


@dataclass(eq=False)
class _Input:
    """A tensor that layers were given. Threads that run a model at once each have their own."""

    x: torch.Tensor
    version: int
    layers: list[MultiBooleanLinear]  # that were called with it, in order
    ahead: dict[MultiBooleanLinear, tuple[torch.Tensor, list[int]]] = field(default_factory=dict)  # y, and of what


class SharedInput:
    """What the multi-Boolean layers of one module know of each other's inputs."""

    def __init__(self) -> None:
        self._together: dict[MultiBooleanLinear, list[MultiBooleanLinear]] = {}  # by the one that is called first
        self._last: _Input | None = None

    def serves(self, layer: MultiBooleanLinear, x: torch.Tensor) -> bool:
        """Whether ``layer`` decodes ``x`` (..., n) from packed words, without a gradient."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference():  # the last has no version
            return False
        return decodes(x.numel() // layer.in_features, product_dtype(x), x.device, layer.num_planes)

    def multiply(self, layer: MultiBooleanLinear, x: torch.Tensor) -> torch.Tensor:
        """y (..., m) of a layer that is served, without its bias."""
        given, dtype = self._last, product_dtype(x)
        if given is None or given.x is not x or given.version != x._version or layer in given.layers:
            if given is not None:
                self._together[given.layers[0]] = given.layers
            given = self._last = _Input(x, x._version, [layer])
        else:
            given.layers.append(layer)
        y, of = given.ahead.pop(layer, (None, None))
        if y is None or y.dtype != dtype or of != _versions(layer):
            done = (*given.layers, *given.ahead)
            others = [other for other in self._together.get(layer, []) if other not in done and _fits(other, layer, x)]
            weights = [(each.planes, each.scale_out.detach(), each.scale_in.detach()) for each in (layer, *others)]
            y, *ahead = linear_decode_together(x.reshape(-1, layer.in_features).to(dtype), weights)
            given.ahead |= {other: (y, _versions(other)) for other, y in zip(others, ahead, strict=True)}
        return y.reshape(*x.shape[:-1], layer.out_features)


def _fits(other: MultiBooleanLinear, layer: MultiBooleanLinear, x: torch.Tensor) -> bool:
    """Same planes and columns, and at hand: neither cut over ranks at the moment nor on another device."""
    same = (other.num_planes, other.in_features) == (layer.num_planes, layer.in_features)
    return same and all(p.numel() > 0 and p.device == x.device for p in other.parameters(recurse=False))


def _versions(layer: MultiBooleanLinear) -> list[int]:
    """Not the same after a change in place of planes or scales."""
    return [p._version for p in (*layer.planes, layer.scale_out, layer.scale_in)]

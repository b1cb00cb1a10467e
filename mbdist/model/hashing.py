"""A digest of all planes of a model: equal digests, equal bits."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from mbdist.model.layers import boolean_layers


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_planes(model: nn.Module) -> str:
    """sha256 of the planes of all multi-Boolean layers."""
    return hash_tensors(
        {f"{name}.plane_{k}": plane for name, layer in boolean_layers(model) for k, plane in enumerate(layer.planes)}
    )

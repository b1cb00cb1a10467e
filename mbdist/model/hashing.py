"""Digests of the planes of a model (equal digests, equal bits) and of the files that it is in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from mbdist.model.layers import boolean_layers

_FINGERPRINT_BYTES = 1 << 16


def fingerprint_files(files: Iterable[Path]) -> list[tuple[str, int, str]]:
    """(name, bytes, digest of the first and the last of them) of each: weights that were trained on differ in their
    last, and a large model is not read for it."""
    return sorted((file.name, *_ends(file)) for file in files)


def _ends(file: Path) -> tuple[int, str]:
    size = file.stat().st_size
    with file.open("rb") as content:
        ends = content.read(_FINGERPRINT_BYTES)
        content.seek(max(0, size - _FINGERPRINT_BYTES))
        ends += content.read()
    return size, hashlib.sha256(ends).hexdigest()


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

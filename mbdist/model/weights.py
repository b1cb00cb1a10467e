"""The weights of a model on disk, read by name and range: no process holds more of them than it asks for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from mbdist.config.model import ModelConfig
from mbdist.errors import UserError
from mbdist.model.loading import clear_errors, safetensors_of
from mbdist.model.tensor_files import StoredTensor, stored_tensors

_CHUNK_BYTES = 16 << 20  # on their way from a file into a tensor
_WHOLE = 1 << 18  # elements of the largest tensor of floats that the digest reads whole
_SAMPLES, _SAMPLE = 16, 128  # of every other one: so many, of so many elements


class Weights(Protocol):
    """Where the content of a model's tensors comes from."""

    def fill(
        self,
        name: str,
        first: int,
        out: torch.Tensor,  # (count,) of any dtype and device
    ) -> None:
        """Write elements [first, first + count) of a tensor, counted flat, into ``out``."""


class WeightFiles:
    """The safetensors files of a folder or hub id, for a model of their kind.

    Raises UserError where a file is missing or damaged, lacks a tensor of the model, or has it in another shape.
    """

    def __init__(
        self,
        source: ModelConfig,
        model: nn.Module,  # on whatever device: only names and shapes are looked at
    ):
        with clear_errors(source):
            files = safetensors_of(source)
            stored = {name: tensor for file in files for name, tensor in _tensors_in(file).items()}
        self._tensors: dict[str, StoredTensor] = {}  # by every name of the model: a tied tensor has several
        problems = []
        for names, shape in _tensors_of(model):
            found = next((stored[name] for name in names if name in stored), None)
            if found is None:
                problems.append(f"{names[0]} is missing")
            elif found.shape != list(shape):
                problems.append(f"{names[0]} has the shape {found.shape} and not {list(shape)}")
            else:
                self._tensors |= dict.fromkeys(names, found)
        if problems:
            raise UserError(
                f"the checkpoint {source.path} is damaged or of another model; {len(problems)} of its tensors do not "
                f"fit config.json: {'; '.join(problems[:3])}. Convert the model again"
            )

    def fill(self, name: str, first: int, out: torch.Tensor) -> None:
        tensor = self._tensors[name]
        reached = 0
        for part in out.split(_CHUNK_BYTES // tensor.dtype.itemsize):
            part.copy_(tensor.read(first + reached, part.numel()))
            reached += part.numel()

    def digest(self) -> str:
        """SHA-256 over the names, types and shapes of all tensors, the content of small ones of floats and samples of
        planes and large ones, read in a moment whatever the model's size. Scales are small, and found from all bits of
        their matrix: a conversion that came to other bits anywhere shows in them."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            end = tensor.num_elements
            whole = end <= _WHOLE and tensor.dtype != torch.int32
            step, count = (end, end) if whole else (max(_SAMPLE, end // _SAMPLES), _SAMPLE)
            for first in range(0, end, step or 1):
                values = tensor.read(first, min(count, end - first))
                digest.update(values.view(torch.uint8).numpy())
        return digest.hexdigest()


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    try:
        return stored_tensors(file)
    except SafetensorError as error:
        raise OSError(f"{file} is damaged or was not written to its end: {error}") from error


def _tensors_of(model: nn.Module) -> list[tuple[list[str], torch.Size]]:
    """([names], shape) of every parameter and saved buffer."""
    saved = model.state_dict().keys()
    found: dict[torch.Tensor, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved),
    ]:
        found.setdefault(tensor, []).append(name)
    return [(names, tensor.shape) for tensor, names in found.items()]

"""The weights of a float model where they lie: safetensors files, read one part of the model at a time.

Names, fusions and splits of tensors are transformers' own: every part goes through the loader that ``from_pretrained``
uses for the whole model, into a second, empty model that serves for nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from mbdist.config.model import ModelConfig
from mbdist.errors import UserError
from mbdist.model.layers import is_linear
from mbdist.model.loading import clear_errors

_ALIGNMENT = 64  # bytes, as torch allocates


class FloatWeights:
    """Tensors (fp32) of a model by the model's own names.

    Raises UserError, from the files' headers alone, where a weight is missing or its shape is not the config's.
    """

    def __init__(
        self,
        source: ModelConfig,
        files: list[Path],  # as safetensors_of finds them
        model: PreTrainedModel,  # empty
    ):
        self.source = source
        self.files = files
        self._empty = copy.deepcopy(model)
        self._loading = LoadStateDictConfig(
            device_map={"": "cpu"}, dtype=torch.float32, weight_mapping=get_model_conversion_mapping(self._empty)
        )
        self._file_of: dict[str, Path] = {}  # by key in the checkpoint
        headers = {}
        for file in files:
            with self._opened(file) as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    self._file_of[key] = file
                    headers[key] = torch.empty(opened.get_slice(key).get_shape(), device="meta")
        self._check(headers)
        self._target_of = self._targets()  # by key: (name in the model, whether several keys make it or it several)

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def read(self, *parts: str) -> dict[str, torch.Tensor]:
        """All tensors of the modules and parameters named, each in memory of its own.

        Raises UserError where one holds NaN or infinity.
        """
        keys = [key for key, target in self._target_of.items() if any(_needed(part, *target) for part in parts)]
        found: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            opened = {file: stack.enter_context(self._opened(file)) for file in {self._file_of[key] for key in keys}}
            self._load({key: opened[self._file_of[key]].get_slice(key) for key in keys}, self._loading)
        for name, tensor in self._empty.state_dict().items():
            if not tensor.is_meta:
                if any(_within(name, part) for part in parts):
                    found[name] = self._checked(name, tensor)
                _empty_again(self._empty, name)
        return found

    @contextmanager
    def filled(
        self,
        model: PreTrainedModel,
        parts: list[str],
        linear_dtype: torch.dtype = torch.float32,  # of weight matrices of linear layers
    ) -> Iterator[None]:
        """The empty parameters of these parts of ``model`` hold their values, then are empty again."""
        empty = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_meta and any(_within(name, part) for part in parts)
        }
        names = {id(parameter): name for name, parameter in empty.items()}
        places = [  # a weight that is tied has several
            (module, leaf, names[id(parameter)])
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        found = self.read(*empty) if empty else {}
        filled = {}
        for module, leaf, name in places:
            if name not in filled:
                dtype = linear_dtype if is_linear(module) and leaf == "weight" else torch.float32
                filled[name] = nn.Parameter(found.pop(name).to(dtype), requires_grad=False)
            setattr(module, leaf, filled[name])
        del filled
        try:
            yield
        finally:
            for module, leaf, name in places:
                setattr(module, leaf, empty[name])

    @contextmanager
    def _opened(self, file: Path) -> Iterator:
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged or was cut short ({error}); fetch it again") from error

    def _load(self, tensors: dict, how: LoadStateDictConfig):
        with clear_errors(self.source):
            return convert_and_load_state_dict_in_model(self._empty, tensors, how)[0]

    def _check(self, headers: dict[str, torch.Tensor]) -> None:
        """What loading would find, from tensors without values."""
        info = self._load(headers, dataclasses.replace(self._loading, device_map={"": "meta"}))
        self._empty._adjust_missing_and_unexpected_keys(info)
        path = self.source.path
        if info.mismatched_keys:
            name, has, expected = sorted(info.mismatched_keys)[0]
            raise UserError(
                f"the checkpoint {path} has {name} in the shape {tuple(has)}, its config says {tuple(expected)} "
                f"({len(info.mismatched_keys)} weight(s) differ): config.json is of another model"
            )
        if missing := sorted(info.missing_keys - self._empty.all_tied_weights_keys.keys()):
            raise UserError(
                f"the checkpoint {path} lacks {len(missing)} weight(s), first {missing[0]}; it is damaged, or of "
                "another model"
            )
        if info.conversion_errors:
            raise UserError(f"the checkpoint {path} cannot be read: {next(iter(info.conversion_errors.values()))}")

    def _targets(self) -> dict[str, tuple[str, bool]]:
        mapping = self._loading.weight_mapping
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, names = self._empty.base_model_prefix, self._empty.state_dict()
        targets = {}
        for key in self._file_of:
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names and key in names:  # as the loader has it
                target, pattern = rename_source_key(key, [], [], prefix, names)
            targets[key] = target, pattern is not None
        return targets

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise UserError(f"{name} of {self.source.path} holds NaN or infinity; the checkpoint is damaged")
        # A tensor that is still a piece of a mapped file lies anywhere, and sums of a BLAS depend on where.
        return tensor.detach().clone() if tensor.data_ptr() % _ALIGNMENT else tensor.detach()


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _needed(part: str, target: str, converted: bool) -> bool:
    """Whether a tensor of the checkpoint is wanted for a part. One that is fused or split with others belongs to all of
    its decoder block: everything up to the first number of its name."""
    return _within(target, part) or (converted and _block_of(target) == _block_of(part))


def _block_of(name: str) -> str:
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return found.group() if found else ""


def _empty_again(model: nn.Module, name: str) -> None:
    module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False))

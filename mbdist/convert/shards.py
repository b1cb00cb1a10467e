"""How the output of a conversion is cut into files, and what it takes of the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from mbdist.config.convert import ConvertConfig
from mbdist.convert.allocation import plane_bits
from mbdist.errors import UserError
from mbdist.model.layers import linear_shape
from mbdist_kernels import words_per_row

_SHARD_BYTES = 256 << 20  # of float tensors outside of the blocks; a larger tensor has a shard of its own


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the output."""

    layers: list[str]  # converted in it
    floats: list[str]  # tensors that stay as they are


def cut_into_shards(model: PreTrainedModel, layers_of: dict[str | None, list[str]]) -> Iterator[Shard]:
    """What is around the blocks in files of bounded size, then a file a block, then layers outside of the blocks."""
    converted = {f"{name}.weight" for names in layers_of.values() for name in names}
    kept = {
        name: 4 * tensor.numel()
        for name, tensor in model.state_dict().items()
        if name not in converted and name not in model.all_tied_weights_keys
    }
    blocks = [block for block in layers_of if block is not None]
    around = {name: size for name, size in kept.items() if not name.startswith(tuple(f"{block}." for block in blocks))}
    names: list[str] = []
    held = 0
    for name, size in around.items():
        if names and held + size > _SHARD_BYTES:
            yield Shard([], names)
            names, held = [], 0
        names, held = [*names, name], held + size
    if names:
        yield Shard([], names)
    for block in blocks:
        yield Shard(layers_of[block], [name for name in kept if name.startswith(f"{block}.")])
    if outside := layers_of.get(None):
        yield Shard(outside, [])


def check_disk(
    output: Path,
    model: PreTrainedModel,  # empty
    layers: dict[str, nn.Module],
    config: ConvertConfig,
    squared_tokens: int,  # of the pass that squared moments are taken in
    num_blocks: int,
    rewritten: bool,  # whether the float model is written beside the output first
    there: int,  # bytes of an unfinished conversion that are on the disk already
) -> None:
    """Raise UserError where the disk has no room for the output and for what is put aside meanwhile."""
    shapes = [linear_shape(layer) for layer in layers.values()]
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.bits is not None:
        planes = config.bits * sum(m * n for m, n in shapes) / 8
    else:
        packed = (4 * m * words_per_row(n) + (plane_bits((m, n)) - m * n) // 8 for m, n in shapes)
        planes = config.planes * sum(packed)
    needed = planes + 4 * (total - sum(m * n for m, n in shapes))
    if rewritten:
        needed += 4 * total
    if config.needs_calibration:
        states = 4 * model.config.get_text_config(decoder=True).hidden_size  # bytes a token
        squares = min(config.calibration_tokens, squared_tokens) * (num_blocks + 3)
        needed += states * max(squares, 5 * config.calibration_tokens)
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free + there
    if needed > free:
        raise UserError(
            f"the conversion writes about {needed / 2**30:.1f} GiB to {output}, states that it puts aside included; "
            f"{free / 2**30:.1f} GiB are free there; name an OUTPUT on a larger disk"
        )

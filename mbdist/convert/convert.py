"""Reads a float model's files and writes a multi-Boolean model's, one block at a time: the model is never in memory.

A block whose file is written is done. A conversion that is killed goes on from the first block that is not, and writes
the same bits as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

import mbdist
from mbdist.config.convert import ConvertConfig
from mbdist.config.model import ModelConfig
from mbdist.convert.allocation import allocate, plane_bits, residual_errors, sampled, second_order_errors, spare_bits
from mbdist.convert.aside import Aside
from mbdist.convert.blocks import ModelBlocks, layers_by_block
from mbdist.convert.calibrated import OutputMetric
from mbdist.convert.calibration import BlockCalibration, BlockWalk, sharing_inputs
from mbdist.convert.initialize import INITIALIZATIONS, Matrix, Spread, in_turn
from mbdist.convert.joint import ordered_by_scale
from mbdist.convert.moments import LayerMoments, squared_moments
from mbdist.convert.partial_folder import PartialFolder, partial_folder_of
from mbdist.convert.planes import PlaneSet
from mbdist.convert.reconstruction import Reconstructed, reconstruct
from mbdist.convert.shards import Shard, check_disk, cut_into_shards
from mbdist.data.calibration import BATCH_TOKENS
from mbdist.errors import UserError
from mbdist.free_memory import give_back
from mbdist.model.float_weights import FloatWeights
from mbdist.model.hashing import fingerprint_files, hash_tensors
from mbdist.model.layers import convertible_layers, linear_shape, replace_module
from mbdist.model.linear import MultiBooleanLinear
from mbdist.model.loading import empty_model, load_model, resolve_path, safetensors_of
from mbdist.model.quantizer import MultiBooleanConfig
from mbdist.optim import BooleanOptimizer, OptimizerOfBits
from mbdist.whole_files import replaced_folder

_SQUARED_BATCHES = 8  # of 2048 tokens: vectors need fewer than X^T X, and a backward pass costs more


@dataclass(frozen=True)
class LayerReport:
    """One line of the conversion table."""

    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    planes: int
    relative_error: float  # ||W - W_hat||^2 / ||W||^2
    # Where its block's outputs are reconstructed:
    output_error: float | None = None  # ||Y - Y_hat||^2 / ||Y||^2 of them
    moves_per_weight: float | None = None  # that its bits made in all steps


def bits_per_weight(reports: Iterable[LayerReport]) -> float:
    """Average bits a weight of the converted layers: planes and fp32 scales counted, biases not."""
    reports = list(reports)
    bits = sum(report.planes * plane_bits(report.shape) for report in reports)
    return bits / sum(report.shape[0] * report.shape[1] for report in reports)


class Conversion:
    """One float model on its way into the folder ``output``. Making one checks all that can be known before the work.

    Raises UserError where the model has no layers to convert, its checkpoint is incomplete or does not fit its config,
    or the disk has no room for the output.
    """

    def __init__(
        self,
        source: ModelConfig,
        output: Path,
        config: ConvertConfig,
        dtype: torch.dtype = torch.float32,  # of the calibration's passes through the model
        spread: Spread = in_turn,  # of the matrices of a block, and of their rows, over processes
        optimizer: OptimizerOfBits = BooleanOptimizer,  # of a reconstruction
        replace: bool = False,  # an earlier output, and what an unfinished one of other settings left
        between: Callable[[], None] = lambda: None,  # called whenever there is progress; may raise
    ):
        self.source, self.output, self.config = source, output, config
        self.dtype, self.optimizer, self.replace, self.between = dtype, optimizer, replace, between

        def noticed(result: Any) -> Any:
            between()
            return result

        # A loop would hold on to its last result while memory is given back.
        self.spread = lambda function, jobs: map(noticed, spread(function, jobs))
        if not replace and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} exists and is not an empty folder; name another OUTPUT or remove it")
        self.model = empty_model(source)
        if not source.gguf_file and getattr(self.model.config, "quantization_config", None):
            raise UserError(f"{source.path} is quantised already; convert the float model that it was made from")
        self.layers = convertible_layers(self.model, config.include, config.exclude)  # all of them empty
        if config.bits is not None:
            spare_bits(self.shapes, config.bits, config.max_planes)
        self.layers_of = layers_by_block(self.model, self.layers)
        self.shards = list(cut_into_shards(self.model, self.layers_of))
        files = safetensors_of(source)
        self._weights = FloatWeights(source, files, self.model) if files else None
        folder = partial_folder_of(output)
        check_disk(
            output,
            self.model,
            self.layers,
            config,
            squared_tokens=_SQUARED_BATCHES * BATCH_TOKENS,
            num_blocks=len(self.layers_of) - 1,
            rewritten=self.loads_whole,
            there=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) by layer."""
        return {name: linear_shape(layer) for name, layer in self.layers.items()}

    @property
    def loads_whole(self) -> bool:
        """Whether the model is in a format (GGUF) that has to be read whole, once, into memory."""
        return self._weights is None

    def run(
        self,
        calibration: Iterable[torch.Tensor] = (),  # batches of token ids (batch, window), if config.needs_calibration
        tokenizer: PreTrainedTokenizerBase | None = None,  # to save with the model
    ) -> Iterator[LayerReport]:
        """Convert, yielding a report after each layer; ``output`` is there, complete, once this is exhausted."""
        batches = list(calibration)
        with PartialFolder(self.output, self._key(batches), len(self.shards), self.replace) as folder:
            left = [name for number, shard in enumerate(self.shards) if not folder.has(number) for name in shard.layers]
            if self._weights is None and not all(map(folder.has, range(len(self.shards)))):
                self._weights = _rewritten(self.source, folder.scratch / "float")
            blocks, moments = None, {}
            if self.config.needs_calibration and left:
                aside = Aside(folder.scratch)
                blocks = ModelBlocks(self.model, self.layers, batches, self.dtype, aside, self._hold, self.between)
                moments = squared_moments(blocks, _SQUARED_BATCHES)
            planes = folder.remembered("planes", partial(self._choose_planes, blocks, moments))
            if self.config.init != "calibrated":
                matrices = [Matrix(partial(self._weight, name), planes[name]) for name in left]
                initialized = INITIALIZATIONS[self.config.init](matrices, self.spread)
            elif left:
                finished = {block for block, names in self.layers_of.items() if not set(left).intersection(names)}
                walk = iter(BlockWalk(blocks, self.config.sequential, self.config.reconstructs, finished))
            for number, shard in enumerate(self.shards):
                if not folder.has(number):
                    found, reconstructed = {}, None
                    if shard.layers and self.config.init == "calibrated":
                        found, reconstructed = self._calibrated(next(walk), planes, moments)
                    elif shard.layers:
                        found = {name: next(initialized) for name in shard.layers}
                    assert list(found) == shard.layers, "the walk is at another block"
                    folder.write(number, *self._described(shard, found, reconstructed))
                    del found
                    give_back()
                for report in folder.reports(number):
                    yield LayerReport(**{**report, "shape": tuple(report["shape"])})
            folder.finish(partial(self._save_rest, planes, tokenizer))

    def _calibrated(
        self, block: BlockCalibration, planes: dict[str, int], moments: dict[str, LayerMoments]
    ) -> tuple[dict[str, PlaneSet], Reconstructed | None]:
        """Planes and scales of the layers of a block, and what its reconstruction did if there is one."""
        matrices = []
        for name in block.layers:
            moments[name].gram = block.grams.pop(name)
            matrices.append(Matrix(partial(self._weight, name), planes[name], moments[name]))
        found = dict(zip(block.layers, INITIALIZATIONS["calibrated"](matrices, self.spread), strict=True))
        if block.name is None or not (self.config.sequential or self.config.reconstructs):
            return found, None
        reconstructed = None
        originals = {name: self.model.get_submodule(name) for name in block.layers}
        layers = {name: layer_from(found[name], original.bias) for name, original in originals.items()}
        for name, layer in layers.items():
            replace_module(self.model, name, layer)
        with self._hold([block.name]):
            if self.config.reconstructs:
                reconstructed = reconstruct(layers, block, self.config.reconstruction, self.optimizer)
            _ = block.outputs  # put aside before the shard is written: a conversion that is killed goes on from them
        for name, original in originals.items():
            replace_module(self.model, name, original)
        return {name: ordered_by_scale(planes_of(layer)) for name, layer in layers.items()}, reconstructed

    def _described(
        self, shard: Shard, found: dict[str, PlaneSet], reconstructed: Reconstructed | None
    ) -> tuple[dict[str, torch.Tensor], list[dict]]:
        """A shard's tensors and its layers' reports."""
        tensors, reports = self._weights.read(*shard.floats), []
        for name, of_layer in found.items():
            tensors |= {f"{name}.plane_{k}": plane for k, plane in enumerate(of_layer.planes)}
            tensors |= {f"{name}.scale_out": of_layer.scale_out, f"{name}.scale_in": of_layer.scale_in}
            error = of_layer.relative_error(self._weight(name))
            shape = linear_shape(self.layers[name])
            report = LayerReport(name, shape, len(of_layer.planes), error)
            if reconstructed is not None:
                moves = reconstructed.moves[name] / math.prod(shape)
                report = replace(report, output_error=reconstructed.output_error, moves_per_weight=moves)
            reports.append(vars(report))
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, reports

    def _weight(self, name: str) -> torch.Tensor:
        (weight,) = self._weights.read(f"{name}.weight").values()
        return weight if isinstance(self.layers[name], nn.Linear) else weight.T

    def _hold(self, parts: list[str]) -> AbstractContextManager:
        return self._weights.filled(self.model, parts, linear_dtype=self.dtype)

    def _choose_planes(self, blocks: ModelBlocks | None, moments: dict[str, LayerMoments]) -> dict[str, int]:
        """Planes by layer: the same for all, or by allocation where a budget of bits is given."""
        config = self.config
        if config.bits is None:
            return dict.fromkeys(self.layers, config.planes)
        shapes = self.shapes
        second_order = config.allocation == "second_order"
        if second_order:
            errors = self._second_order_errors(blocks, moments)
        else:
            weights = sum(m * n for m, n in shapes.values())
            jobs = ((self._weight(name), m * n / weights, config.max_planes) for name, (m, n) in shapes.items())
            errors = dict(zip(shapes, self.spread(residual_errors, jobs), strict=True))
        return allocate(errors, shapes, config.bits, per_bit=second_order)

    def _second_order_errors(self, blocks: ModelBlocks, moments: dict[str, LayerMoments]) -> dict[str, list[float]]:
        """By layer. A walk of its own through the float model: blocks are compared before one is converted."""
        errors: dict[str, list[float]] = {}
        for block in BlockWalk(blocks):
            for names in sharing_inputs(block.grams):
                for name in names:
                    gram = block.grams.pop(name)  # the same for all of them
                (metric,) = self.spread(OutputMetric.of, [(gram,)])
                some = (sampled(self._weight(name), moments[name]) for name in names)
                jobs = ((*rows, metric, self.config.max_planes) for rows in some)
                errors |= zip(names, self.spread(second_order_errors, jobs), strict=True)
                del gram, metric
                give_back()
        return errors

    def _key(self, batches: list[torch.Tensor]) -> dict[str, object]:
        """What the output depends on."""
        if self._weights is not None:
            files = self._weights.files
        else:
            files = [file for file in Path(resolve_path(self.source.path)).glob("*.*") if file.is_file()]
        tokens = {str(number): batch for number, batch in enumerate(batches)}
        return {
            **self.config.model_dump(mode="json"),
            "the model": [self.source.gguf_file, self.model.config.to_json_string(), fingerprint_files(files)],
            "the calibration text": hash_tensors(tokens),
            "the compute type": str(self.dtype),
            "the version of mbdist": mbdist.__version__,
        }

    def _save_rest(self, planes: dict[str, int], tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
        """What ``save_pretrained`` writes besides weights."""
        model, config = self.model, self.model.config
        config.quantization_config = MultiBooleanConfig(planes=planes)
        config.dtype = "float32"
        config.architectures = [type(model).__name__]
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _rewritten(source: ModelConfig, folder: Path) -> FloatWeights:
    """The model as safetensors files, read whole where it has to be."""
    if not folder.is_dir():
        with replaced_folder(folder) as target:
            load_model(source).save_pretrained(target, max_shard_size="1GB")
    rewritten = ModelConfig(path=str(folder), trust_remote_code=source.trust_remote_code)
    return FloatWeights(rewritten, safetensors_of(rewritten), empty_model(rewritten))


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
    return layer

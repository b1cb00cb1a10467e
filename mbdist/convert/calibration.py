"""What the calibrated initialisation knows of a layer: second moments of its inputs and output gradients.

Two passes over the calibration tokens. The first goes forward and backward through the whole float model and keeps one
vector a layer. The second goes through the model block by block, over all tokens at a time, so only the hidden states
between two blocks and the X^T X of one block are held. Two streams of them are followed where they are needed: those of
the float model, and those that the blocks converted so far make of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.model.layers import linear_shape


@dataclass
class LayerMoments:
    """Moments of one linear layer over the calibration tokens."""

    input_squares: torch.Tensor  # (n,) fp32: sum over tokens of x^2
    output_squares: torch.Tensor  # (m,) fp32: sum over tokens of (dL/dy)^2, L the next-token loss
    gram: torch.Tensor | None = None  # (n, n) fp32: sum over tokens of x x^T, of the block that is converted


def squared_moments(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    batches: Sequence[torch.Tensor],  # (batch, window) int64 token ids
    dtype: torch.dtype,  # of the passes through the model; moments are summed in fp32
) -> dict[str, LayerMoments]:
    """Squares of every layer's inputs and output gradients in one forward and backward pass of the float model."""
    moments = {}
    with ExitStack() as hooks, _without_weight_gradients(model), _computing_in(dtype):
        for name, layer in layers.items():
            out_features, in_features = linear_shape(layer)
            moments[name] = LayerMoments(torch.zeros(in_features), torch.zeros(out_features))

            def before_forward(_layer, inputs, of=moments[name]):
                of.input_squares += _square_sums(inputs[0])

            def after_backward(_layer, _grad_inputs, grad_outputs, of=moments[name]):
                of.output_squares += _square_sums(grad_outputs[0])

            hooks.callback(layer.register_forward_pre_hook(before_forward).remove)
            hooks.callback(layer.register_full_backward_hook(after_backward).remove)
        for ids in batches:
            # Gradients are wanted at the layers' outputs only: starting them at the embeddings spares the weights'.
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    return moments


def _computing_in(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def _square_sums(values: torch.Tensor) -> torch.Tensor:
    return values.detach().flatten(0, -2).float().square().sum(0)


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in requires_grad.items():
            parameter.requires_grad_(wanted)


def block_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the decoder blocks: the children of the module list that holds most of the layers."""
    best: list[str] = []
    held = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(layer.startswith(f"{name}.") for layer in layers)
            if inside > held:
                best, held = [f"{name}.{i}" for i in range(len(module))], inside
    return best


def layers_by_block(model: nn.Module, layers: Iterable[str]) -> dict[str | None, list[str]]:
    """Names of the layers by block, in model order; those outside of any block come first, under None."""
    blocks = block_names(model, layers)
    groups: dict[str | None, list[str]] = {block: [] for block in (None, *blocks)}
    for name in layers:
        groups[next((block for block in blocks if name.startswith(f"{block}.")), None)].append(name)
    return groups


@dataclass
class _BlockCall:
    """How the model calls one block on one batch."""

    hidden_states: torch.Tensor | None  # held for the block that is next
    arguments: tuple
    keywords: dict


@dataclass
class BlockCalibration:
    """One decoder block, still in floating point, and what is known of it when its turn to be converted comes."""

    layers: list[str]  # names of those to convert
    grams: dict[str, torch.Tensor]  # of each: X^T X (n, n) fp32
    inputs: list[torch.Tensor] = field(default_factory=list)  # of every batch: the converted model's states before it
    targets: list[torch.Tensor] = field(default_factory=list)  # the float model's states after it
    forward: Callable[[int, torch.Tensor], torch.Tensor] | None = None  # (number of a batch, states before) -> after

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        """What the block makes of ``inputs``, computed once: to be asked for when it is converted, not before."""
        with torch.no_grad():
            return [self.forward(number, before) for number, before in enumerate(self.inputs)]


class BlockWalk:
    """Iterates over the blocks, in model order. The caller converts a block before it asks for the next one.

    ``sequential``: X^T X is that of the converted stream. ``follow_both``: ``inputs`` and ``targets`` are given.
    Layers outside of any block come first, without states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, nn.Module],
        batches: Sequence[torch.Tensor],
        dtype: torch.dtype,  # of the passes through the model; moments are summed in fp32
        sequential: bool = False,
        follow_both: bool = False,
    ):
        self.model = model
        self.dtype = dtype
        self.batches = batches
        self.sequential = sequential
        self.follow_both = follow_both
        self.layers_of = layers_by_block(model, layers)
        self.outside = self.layers_of.pop(None)
        self.blocks = list(self.layers_of)

    @torch.no_grad()
    def __iter__(self) -> Iterator[BlockCalibration]:
        if self.outside:
            grams, _ = self._moments_of(self.outside, self._run_model)
            yield BlockCalibration(self.outside, grams)
        calls = self._calls() if self.blocks else {}
        float_states = [call.hidden_states for call in calls[self.blocks[0]]] if calls else []
        states = float_states
        needed = max((i for i, block in enumerate(self.blocks) if self.layers_of[block]), default=-1) + 1
        for block in self.blocks[:needed]:
            names, run = self.layers_of[block], partial(self._run, block, calls[block])
            grams, float_outputs = self._moments_of(names, partial(run, states if self.sequential else float_states))
            if self.sequential and self.follow_both:
                float_outputs = run(float_states)
            found = BlockCalibration(names, grams, states, float_outputs, partial(self._call, block, calls[block]))
            if names:
                yield found
            states = found.outputs if self.sequential or self.follow_both else float_outputs
            float_states = float_outputs if self.follow_both else states

    def _moments_of(
        self, names: list[str], run: Callable[[], list[torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """X^T X by layer while ``run`` runs, and what it returns. Layers called with one tensor, as queries, keys and
        values are, share one."""
        grams: dict[str, torch.Tensor] = {}
        sums: dict[str, torch.Tensor] = {}  # by the first of the layers that share it
        seen: tuple[torch.Tensor | None, str] = (None, "")

        def before_forward(name: str):
            def hook(_layer, inputs):
                nonlocal seen
                if inputs[0] is not seen[0]:
                    seen = (inputs[0], name)
                    x = inputs[0].flatten(0, -2).float()
                    if name not in sums:
                        sums[name] = torch.zeros(x.shape[1], x.shape[1])
                    with torch.autocast("cpu", enabled=False):
                        sums[name].addmm_(x.T, x)
                grams[name] = sums[seen[1]]

            return hook

        with ExitStack() as hooks:
            for name in names:
                layer = self.model.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(before_forward(name)).remove)
            with _computing_in(self.dtype):
                outputs = run()
        for name in names:  # a layer that no token reached, an expert say
            n = linear_shape(self.model.get_submodule(name))[1]
            grams.setdefault(name, torch.zeros(n, n))
        return {name: grams[name] for name in names}, outputs

    def _run_model(self) -> list[torch.Tensor]:
        model = self.model if self.outside else self.model.base_model  # a head costs time, and has no block in it
        for ids in self.batches:
            model(ids, use_cache=False)
        return []

    def _call(self, block: str, calls: list[_BlockCall], number: int, states: torch.Tensor) -> torch.Tensor:
        with _computing_in(self.dtype):
            output = self.model.get_submodule(block)(states, *calls[number].arguments, **calls[number].keywords)
        return output[0] if isinstance(output, tuple) else output

    def _run(self, block: str, calls: list[_BlockCall], states: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._call(block, calls, number, before) for number, before in enumerate(states)]

    def _calls(self) -> dict[str, list[_BlockCall]]:
        """What every block is called with on every batch (masks and positions are shared between blocks), from one
        forward pass; the hidden states are kept for the first block only."""
        calls: dict[str, list[_BlockCall]] = {block: [] for block in self.blocks}

        def before_forward(block: str):
            def hook(_module, arguments, keywords):
                keywords = dict(keywords)
                hidden = keywords.pop("hidden_states", None)
                if hidden is None:
                    hidden, *rest = arguments
                    arguments = tuple(rest)
                calls[block].append(_BlockCall(hidden if block == self.blocks[0] else None, arguments, keywords))

            return hook

        with ExitStack() as hooks, _computing_in(self.dtype):
            for block in self.blocks:
                module = self.model.get_submodule(block)
                hooks.callback(module.register_forward_pre_hook(before_forward(block), with_kwargs=True).remove)
            self._run_model()
        return calls

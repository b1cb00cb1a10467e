"""What the calibrated initialisation knows of a layer: second moments of its inputs and output gradients.

Two passes over the calibration tokens. The first goes forward and backward through the whole float model and keeps one
vector a layer. The second goes through the model block by block, over all tokens at a time, so only the hidden states
between two blocks and the X^T X of one block are held. In the sequential mode a block is converted before its outputs
are computed: later blocks see the inputs that the converted model will give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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


def block_names(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """Names of the decoder blocks: the children of the module list that holds most of the layers."""
    best: list[str] = []
    held = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(layer.startswith(f"{name}.") for layer in layers)
            if inside > held:
                best, held = [f"{name}.{i}" for i in range(len(module))], inside
    return best


@dataclass
class _BlockCall:
    """How the model calls one block on one batch."""

    hidden_states: torch.Tensor | None  # held for the block that is next
    arguments: tuple
    keywords: dict


class BlockMoments:
    """Iterates over the blocks: {layer name: X^T X} of the chosen layers of each, in model order.

    Between two iterations the caller may replace the layers; in the sequential mode it must, before the next one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, nn.Module],
        batches: Sequence[torch.Tensor],
        sequential: bool,
        dtype: torch.dtype,  # of the passes through the model; moments are summed in fp32
    ):
        self.model = model
        self.dtype = dtype
        self.batches = batches
        self.sequential = sequential
        self.blocks = block_names(model, layers)
        inside = {name: next((b for b in self.blocks if name.startswith(f"{b}.")), None) for name in layers}
        self.outside = [name for name, block in inside.items() if block is None]
        self.layers_of = {block: [n for n, b in inside.items() if b == block] for block in self.blocks}

    @torch.no_grad()
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.outside:
            yield self._moments_of(self.outside, lambda: [self.model(ids, use_cache=False) for ids in self.batches])
        calls = self._calls() if self.blocks else {}
        states = [call.hidden_states for call in calls[self.blocks[0]]] if calls else []
        for block in self.blocks:
            outputs: list[torch.Tensor] = []
            yield self._moments_of(
                self.layers_of[block], lambda b=block, s=states, o=outputs: o.extend(self._run(b, calls[b], s))
            )
            states = self._run(block, calls[block], states) if self.sequential else outputs

    def _moments_of(self, names: list[str], run) -> dict[str, torch.Tensor]:
        grams = {}
        for name in names:
            n = linear_shape(self.model.get_submodule(name))[1]
            grams[name] = torch.zeros(n, n)

        def before_forward(name: str):
            def hook(_layer, inputs):
                x = inputs[0].flatten(0, -2).float()
                with torch.autocast("cpu", enabled=False):
                    grams[name].addmm_(x.T, x)

            return hook

        with ExitStack() as hooks:
            for name in names:
                layer = self.model.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(before_forward(name)).remove)
            with _computing_in(self.dtype):
                run()
        return grams

    def _run(self, block: str, calls: list[_BlockCall], states: list[torch.Tensor]) -> list[torch.Tensor]:
        module = self.model.get_submodule(block)
        outputs = []
        with _computing_in(self.dtype):
            for call, hidden in zip(calls, states, strict=True):
                output = module(hidden, *call.arguments, **call.keywords)
                outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs

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
            for ids in self.batches:
                self.model(ids, use_cache=False)
        return calls

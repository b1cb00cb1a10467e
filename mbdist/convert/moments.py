"""Squares of every layer's inputs and output gradients: a pass forward and backward, block by block.

Forward, the states between blocks are put aside. Backward, every block is run again, with its gradient from the block
above, so that one block is in memory at a time. What a block leaves is put aside too: after a kill the pass goes on
from the block that it was at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mbdist.convert.aside import Batches
from mbdist.convert.blocks import ModelBlocks
from mbdist.model.layers import linear_shape


@dataclass
class LayerMoments:
    """Moments of one linear layer over the calibration tokens."""

    input_squares: torch.Tensor  # (n,) fp32: sum over tokens of x^2
    output_squares: torch.Tensor  # (m,) fp32: sum over tokens of (dL/dy)^2, L the next-token loss
    gram: torch.Tensor | None = None  # (n, n) fp32: sum over tokens of x x^T, of the block that is converted


def squared_moments(
    blocks: ModelBlocks,
    num_batches: int,  # the first so many
) -> dict[str, LayerMoments]:
    """Of all layers of ``blocks``; summed in fp32."""
    aside, last = blocks.aside, len(blocks)
    num_batches = min(num_batches, len(blocks.batches))
    groups = [*enumerate(blocks.layers_of.values()), (last, blocks.outside)]
    groups = [(block, names) for block, names in groups if names]
    lowest = 0 if blocks.outside else groups[0][0]  # no gradient is wanted below it
    states = [Batches(aside, f"squares-states-{block}", num_batches) for block in range(last + 1)]
    states[0] = Batches(aside, blocks.embedded.name, num_batches)
    gradients = [Batches(aside, f"squares-gradients-{block}", num_batches) for block in range(last + 1)]
    with _without_weight_gradients(blocks.model):
        reached = next((block for block in range(lowest, last) if aside.has(_name_of(block))), last)
        if reached == last and last and not gradients[last].complete:
            _forward(blocks, states, lowest)
            _loss_gradients(blocks, states[last], gradients[last])
        for block in reversed(range(lowest, reached)):
            aside.save(_name_of(block), _backward_through(blocks, block, states[block], *gradients[block : block + 2]))
            gradients[block + 1].drop()
            if 0 < block + 1 < last:
                states[block + 1].drop()
        if blocks.outside and not aside.has(_name_of(last)):
            aside.save(_name_of(last), _of_outside(blocks, states[last], gradients[0]))
    for left in (states[last], gradients[lowest]) if last else ():
        left.drop()
    found = {}
    for block, names in groups:
        sums = aside.load(_name_of(block))
        found |= {name: LayerMoments(sums[f"{name}.inputs"], sums[f"{name}.outputs"]) for name in names}
    return found


def _name_of(block: int) -> str:
    return f"squares-{block}"


@torch.no_grad()
def _forward(blocks: ModelBlocks, states: list[Batches], lowest: int) -> None:
    start = max(block for block in range(len(states)) if states[block].complete)
    for block in range(start, len(blocks)):
        with blocks.hold([blocks.names[block]]):
            for batch, before in enumerate(states[block]):
                states[block + 1].put(batch, blocks.call(block, batch, before))
        if 0 < block < lowest:
            states[block].drop()


def _loss_gradients(blocks: ModelBlocks, states: Batches, gradients: Batches) -> None:
    with blocks.hold(blocks.parameters_around(input_embeddings=False)):
        for batch, after in enumerate(states):
            loss, _ = blocks.around(batch, after.requires_grad_())
            loss.backward()
            gradients.put(batch, after.grad)


def _backward_through(
    blocks: ModelBlocks, block: int, states: Batches, before: Batches, after: Batches
) -> dict[str, torch.Tensor]:
    """Writes the gradients before the block from those after it."""
    names = blocks.layers_of[blocks.names[block]]
    with blocks.hold([blocks.names[block]]), _squares_of(blocks.model, names) as sums:
        for batch, inputs in enumerate(states):
            blocks.call(block, batch, inputs.requires_grad_()).backward(after[batch])
            before.put(batch, inputs.grad)
    return sums


def _of_outside(blocks: ModelBlocks, states: Batches, gradients: Batches) -> dict[str, torch.Tensor]:
    with blocks.hold(blocks.parameters_around()), _squares_of(blocks.model, blocks.outside) as sums:
        for batch in range(len(states)):
            with torch.no_grad():
                embedded = blocks.model.get_input_embeddings()(blocks.batches[batch])
            after = states[batch].requires_grad_() if len(blocks) else embedded
            loss, first = blocks.around(batch, after, embedded.requires_grad_())
            loss.backward()
            if first is not None:
                first.backward(gradients[batch])
    return sums


@contextmanager
def _squares_of(model: nn.Module, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums over tokens of squared inputs and output gradients, by layer, of all that runs meanwhile."""
    sums = {}
    with ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            out_features, in_features = linear_shape(layer)
            inputs = sums[f"{name}.inputs"] = torch.zeros(in_features)
            outputs = sums[f"{name}.outputs"] = torch.zeros(out_features)

            def before_forward(_layer, arguments, of=inputs):
                of += _square_sums(arguments[0])

            def after_backward(_layer, _grad_inputs, grad_outputs, of=outputs):
                of += _square_sums(grad_outputs[0])

            hooks.callback(layer.register_forward_pre_hook(before_forward).remove)
            hooks.callback(layer.register_full_backward_hook(after_backward).remove)
        yield sums


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

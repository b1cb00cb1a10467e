"""What the calibrated initialisation knows of a layer: second moments of its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.model.layers import linear_shape


@dataclass
class LayerStatistics:
    """Moments of one linear layer over the calibration tokens."""

    gram: torch.Tensor  # (n, n) fp32: sum over tokens of x x^T
    output_squares: torch.Tensor  # (m,) fp32: sum over tokens of (dL/dy)^2

    @property
    def input_squares(self) -> torch.Tensor:
        """(n,): sum over tokens of x^2."""
        return self.gram.diagonal()


def calibrate(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    batches: Iterable[torch.Tensor],  # (batch, window) int64 token ids
) -> dict[str, LayerStatistics]:
    """Moments of every layer in one forward and backward pass over the float model (next-token loss).

    Holds one n x n matrix a layer and the activations of one batch.
    """
    statistics = {}
    handles = []
    for name, layer in layers.items():
        out_features, in_features = linear_shape(layer)
        found = LayerStatistics(torch.zeros(in_features, in_features), torch.zeros(out_features))
        statistics[name] = found

        def before_forward(_layer, inputs, found=found):
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            found.gram.addmm_(x.T, x)

        def after_backward(_layer, _grad_inputs, grad_outputs, found=found):
            found.output_squares += grad_outputs[0].detach().flatten(0, -2).float().square().sum(0)

        handles += [layer.register_forward_pre_hook(before_forward), layer.register_full_backward_hook(after_backward)]
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for ids in batches:
            # Gradients are wanted at the layers' outputs only: starting them at the embeddings spares the weights'.
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in requires_grad.items():
            parameter.requires_grad_(wanted)
    return statistics

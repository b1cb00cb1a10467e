"""The method that Boolean finetuning replaces, for comparison: latent weights, straight-through estimator, AdamW.

Trains the last plane, in blocks too, where the Boolean rule moves bits of all planes; through the same layers, only
what becomes of the signal q = dL/dB differs. Latents start anew from the residuals after the blocks. A
latent weight a bit (fp32, with two fp32 moments: 12 bytes) takes q as its gradient, and the bit is its sign.
One rank.
"""

from __future__ import annotations

import torch

from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim import BooleanOptimizer, FlipReport
from mbdist.optim.schedule import warmup_cosine
from mbdist_kernels import WORD_BITS, Signal, pack_signs, popcount, unpack_signs, words_per_row

_LATENT_BOUND = 1.0  # latents are kept in [-1, 1], as is usual: farther out they would never come back


class StraightThrough(BooleanOptimizer):
    """Takes the place of the Boolean optimizer, in finetuning and in the reconstruction of blocks."""

    latent_lr = 2e-3
    reconstruction_lr = 5e-3

    def __init__(
        self,
        layers: dict[str, MultiBooleanLinear],
        *arguments,
        weights: dict[str, torch.Tensor],  # (m, n): what the float model has there
        **keywords,
    ):
        super().__init__(layers, *arguments, **keywords)
        if len(layers) < len(weights):  # those of one block
            self.latent_lr = self.reconstruction_lr
        for entry in self.accumulated:
            entry.accumulator = entry.accumulator.new_empty(0)
        signs = [unpack_signs(layer.planes[-1], layer.in_features) for layer in layers.values()]
        self.latents = [torch.nn.Parameter(sign.float()) for sign in signs]
        self._start_from(weights)
        self.adamw = torch.optim.AdamW(self.latents, lr=self.latent_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def _start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Latents from the float weights (m, n): what the other planes leave, in units of the plane's scale, so that
        bits near their threshold are near it here too. A bit that calibration chose against its residual starts close
        to 0 on its own side."""
        for (name, layer), latent in zip(self.layers.items(), self.latents, strict=True):
            scale = torch.outer(layer.scale_out.detach()[-1], layer.scale_in.detach()[-1])
            signs = latent.detach()
            others = layer.dense_weight() - signs * scale
            relative = (weights[name] - others) / torch.where(scale.abs() < 1e-12, 1e-12, scale)
            agrees = relative.sign() == signs
            latent.data.copy_(torch.where(agrees, relative.clamp(-_LATENT_BOUND, _LATENT_BOUND), 0.1 * signs))

    def signals(self, layer: MultiBooleanLinear) -> list[Signal]:
        values = torch.empty(layer.out_features, words_per_row(layer.in_features) * WORD_BITS)
        return [Signal(layer.scale_out.detach()[-1] / self.gradient_scale, layer.scale_in.detach()[-1], values)]

    def take(self, layer, signals, row_squares, column_squares, tokens) -> None:
        matrix = self._of_layer[id(layer)][0].matrix
        self.curvature.add(matrix, row_squares, column_squares, tokens)
        latent, q = self.latents[matrix], signals[0].values[:, : layer.in_features]
        latent.grad = q.clone() if latent.grad is None else latent.grad.add_(q)

    def skip(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        super().skip()

    def step(self) -> FlipReport:
        schedule = warmup_cosine(self.step_count, self.total_steps, self.config.warmup_fraction)
        for group in self.adamw.param_groups:
            group["lr"] = self.latent_lr * schedule
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        report = FlipReport()
        for (name, layer), latent in zip(self.layers.items(), self.latents, strict=True):
            latent.data.clamp_(-_LATENT_BOUND, _LATENT_BOUND)
            words = layer.planes[-1].data
            new = pack_signs(latent.data)
            report.flips[name] = popcount(words ^ new)
            words.copy_(new)
        self.curvature.discard()
        self.step_count += 1
        self.micro_batch = 0
        return report

    def state_bytes(self) -> dict[str, int]:
        moments = [v for state in self.adamw.state.values() for v in state.values() if torch.is_tensor(v)]
        latents = sum(tensor.nbytes for tensor in [*self.latents, *moments])
        return {"accumulators": latents, "curvature": 0, "flip_bookkeeping": 0}

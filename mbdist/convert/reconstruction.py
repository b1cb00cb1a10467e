"""Finetunes the bits and scales of one converted block until it puts out what the float block did.

A token tells the whole model's loss one number, but a block d of them: the evidence that a single bit should flip
arrives with thousands of times fewer tokens here. The loss is the negative log-likelihood of the block's output errors
as independent Gaussians with the variances of the batch,

    L = 1/2 sum_j log mean_t e_tj^2,

in nats a token, so that the mean of squared gradients is its Gauss-Newton curvature as it is for cross-entropy, and
the rule of ``mbdist.optim`` for flips (threshold 1 of q / (s^2 h)) holds unchanged. The block sees what the blocks
converted before it put out, and answers for their errors. Block reconstruction with latent weights: BRECQ (arXiv
2102.05426), EfficientQAT (arXiv 2407.11062).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import ReplicatedPlanes
from mbdist.config.comm import CommConfig
from mbdist.config.convert import ReconstructionConfig
from mbdist.config.optimizers import BooleanOptimizerConfig, FloatOptimizerConfig
from mbdist.convert.calibration import BlockCalibration
from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim import BooleanOptimizer, OptimizerOfBits
from mbdist.optim.parameter_groups import parameter_groups
from mbdist.optim.schedule import warmup_cosine

_VARIANCE_FLOOR = 1e-6  # of the target's power: a block that is exact already must not divide by zero


@dataclass(frozen=True)
class Reconstructed:
    """What became of a block."""

    output_error: float  # relative squared error of its outputs that is left, over all batches
    moves: Counter[str]  # by layer: weights that moved, counted in every step


def reconstruct(
    layers: dict[str, MultiBooleanLinear],  # of the block, by name
    block: BlockCalibration,
    config: ReconstructionConfig,
    optimizer: OptimizerOfBits = BooleanOptimizer,
) -> Reconstructed:
    """``config.steps`` steps of one calibration batch each; changes the layers."""
    comm = Communicator(alone=True)  # conversion is rank 0's work: the others do not take part
    bits = optimizer(
        layers,
        BooleanOptimizerConfig(
            planes=config.planes,
            signal="curvature",
            step_size=config.step_size,
            max_flip_rate=config.max_flip_rate,
            accumulator=config.accumulator,
        ),
        CommConfig(codec="fp32"),
        comm,
        total_steps=config.steps,
        micro_batches=1,
        seed=0,
    )
    bits.store = ReplicatedPlanes([layer.planes for layer in layers.values()], bits.partitions, comm)
    scales = {
        f"{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in ("scale_out", "scale_in")
    }
    groups = parameter_groups(scales.items(), FloatOptimizerConfig(lr=config.lr))
    rates = [group["lr"] for group in groups]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    numbers: list[int] = []
    moves = Counter(dict.fromkeys(layers, 0))
    for step in range(config.steps):
        numbers = numbers or torch.randperm(len(block.inputs), generator=order).tolist()
        batch = numbers.pop()
        loss = _negative_log_likelihood(block.forward(batch, block.inputs[batch]), block.targets[batch])
        loss.backward(inputs=list(scales.values()))  # norms and biases stay as they are
        bits.finish_micro_batch()
        if bits.all_finite(loss):
            for name, flips in bits.step().flips.items():
                moves[name.partition(".plane_")[0]] += flips
            schedule = warmup_cosine(step, config.steps, 0.05)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * schedule
            adamw.step()
        else:
            bits.skip()
        adamw.zero_grad(set_to_none=True)
    for layer in layers.values():
        layer.signal_sink = None
    return Reconstructed(_relative_error(block), moves)


def _negative_log_likelihood(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    errors = (output.float() - target.float()).flatten(0, -2)  # (T, d)
    floor = _VARIANCE_FLOOR * target.float().square().mean()
    return 0.5 * (errors.square().mean(0) + floor).log().sum()


def _relative_error(block: BlockCalibration) -> float:
    error = power = 0.0
    for output, target in zip(block.outputs, block.targets, strict=True):
        error += (output.float() - target.float()).square().sum().item()
        power += target.float().square().sum().item()
    return error / max(power, 1e-30)

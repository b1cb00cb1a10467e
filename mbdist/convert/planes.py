"""What an initialisation yields for one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbdist.convert.weighted_matrix import WeightedMatrix
from mbdist_kernels import dequantize


@dataclass
class PlaneSet:
    """W_hat = sum_k B_k * outer(scale_out[k], scale_in[k])."""

    planes: list[torch.Tensor]  # K tensors (m, W) int32, packed
    scale_out: torch.Tensor  # (K, m) fp32
    scale_in: torch.Tensor  # (K, n) fp32

    def relative_error(self, weight: torch.Tensor) -> float:
        """||W - W_hat||^2 / ||W||^2 of the matrix (m, n) that this stands for."""
        error = power = 0.0
        for rows, part in WeightedMatrix.of(weight).chunks():
            planes = [plane[rows] for plane in self.planes]
            difference = part - dequantize(planes, self.scale_out[:, rows].contiguous(), self.scale_in)
            error += difference.square().sum(dtype=torch.float64).item()
            power += part.square().sum(dtype=torch.float64).item()
        return error / max(power, 1e-30)

"""Scales solved for in closed form after bits have flipped.

Near where it stands a block's loss is quadratic in a layer's output scales, with the gradient that the backward pass
gave and the factored curvature h_ij = r_i c_j of ``mbdist.optim.curvature``; its minimum over the K scales of a row is

    s_out_i <- s_out_i - N_i^-1 g_i,       N_i,kl = r_i sum_j B_k,ij B_l,ij s_in_kj s_in_lj c_j

with the signs as they are after the flips: a K x K system a row.
"""

from __future__ import annotations

import itertools

import torch

from mbdist.convert.joint import normal_equations
from mbdist.model.linear import MultiBooleanLinear
from mbdist_kernels import unpack_signs

_DAMPING = 0.1  # of the mean diagonal: the curvature is an estimate


@torch.no_grad()
def refit_output_scales(
    layer: MultiBooleanLinear,
    gradient: torch.Tensor,  # (K, m) fp32: dL/ds_out, mean over recent steps
    row_curvature: torch.Tensor,  # (m,) fp32: r
    column_curvature: torch.Tensor,  # (n,) fp32: c
) -> None:
    """Move ``layer.scale_out`` to the minimum of the quadratic model."""
    signs = [unpack_signs(plane, layer.in_features) for plane in layer.planes]
    agreement = {pair: signs[pair[0]] * signs[pair[1]] for pair in itertools.combinations(range(len(signs)), 2)}
    weighted = layer.scale_in * column_curvature.sqrt()
    normal = normal_equations(weighted, layer.out_features, agreement) * row_curvature[:, None, None]
    damping = _DAMPING * normal.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    normal += damping[:, None, None] * torch.eye(layer.num_planes)
    layer.scale_out -= torch.linalg.solve(normal, gradient.T).T

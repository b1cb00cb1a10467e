"""A signal as small whole numbers: 8 or 4 bits a weight, in steps of a row's largest absolute value.

    step_i = max_j |v_ij| / (2^(bits - 1) - 1),      code_ij = rint(v_ij / step_i),      decoded: code_ij step_i

so the error is half a step at most. Four codes of 8 bits, or eight of 4, stand in an int32 word, the first lowest.
Plain torch on every device. Worked example, 4 bits: the row (7, -3.4, 0, 1 ...) has the step 1 and the codes
(7, -3, 0, 1), its first word is 0x...10D7.
"""

from __future__ import annotations

import torch


def encode_rows(
    values: torch.Tensor,  # (m, E) fp32, E a multiple of 32
    bits: int,  # 8 or 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """(words (m, E bits / 32) int32, steps (m,) fp32). A row that is not finite has such a step, others do not."""
    most = float(2 ** (bits - 1) - 1)
    steps = torch.linalg.vector_norm(values, ord=torch.inf, dim=1) / most
    inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
    codes = (values * inverse[:, None]).nan_to_num_(0.0).round_().clamp_(-most, most).to(torch.int8)
    if bits == 4:
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32), steps


def decode_rows(
    words: torch.Tensor,  # (m, L) int32
    steps: torch.Tensor,  # (m,) fp32
    bits: int,
) -> torch.Tensor:
    """The values: fp32 (m, 32 L / bits)."""
    codes = words.contiguous().view(torch.int8)
    if bits == 4:
        codes = torch.stack([(codes << 4) >> 4, codes >> 4], dim=2).flatten(1)
    return codes.float().mul_(steps[:, None])

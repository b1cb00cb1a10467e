"""Counter-based random bits: a pure integer function of (key, element), the same on every device and for any sharding.

``lowbias32`` (Wellons' measured low-bias 32-bit finaliser) of ``index * golden + key``. One hash serves two
neighbouring elements, 15 bits each. The key folds seed, step, contribution and matrix together on the host
(:func:`fold_key`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

RANDOM_BITS = 15
_GOLDEN = 0x9E3779B9
_MASK32 = 0xFFFFFFFF


def fold_key(*parts: int) -> int:
    """Mix integers of any size into one 32-bit key (splitmix64 over the parts)."""
    state = 0
    for part in parts:
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK32


def _lowbias32(x: torch.Tensor) -> torch.Tensor:
    # int64 holding a 32-bit value: torch has no unsigned arithmetic, and masking keeps the shifts logical.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def random_bits(
    key: int,  # 32 bits, from fold_key
    elements: torch.Tensor,  # (E,) int64, global indices of elements below 2**33
) -> torch.Tensor:
    """Uniform integers in [0, 2**15), one an element: int32 (E,)."""
    mixed = _lowbias32(((elements >> 1) * _GOLDEN + key) & _MASK32)
    return torch.where(elements % 2 == 0, mixed & 0x7FFF, mixed >> 17).int()


@triton.jit
def random_bits_of_pairs(
    key,  # uint32
    pair,  # (P,) int64: half the (even) index of a pair's first element
):
    """The same in a kernel: int32 (P, 2)."""
    mixed = pair.to(tl.uint32) * 0x9E3779B9 + key
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    mixed = mixed ^ (mixed >> 16)
    return tl.join((mixed & 0x7FFF).to(tl.int32), (mixed >> 17).to(tl.int32))

"""How accumulators are stored: one a weight, fixed-point in a byte or in half of one, or fp32.

INT8 has the unit 1/64 of the flip threshold: 64 is the threshold, and the octave from 64 to 127 only ranks bits that
wait because the step's cap was reached. INT4 has the unit 1/4 and the range -7 .. 7, two weights a byte: element 2 i in
the lower half of byte i, element 2 i + 1 in the upper, in two's complement. FP32, in units of the threshold, is the
reference that says what fixed point costs. The dtype tells which of them a tensor is: uint8 holds pairs.

Worked example: the values 3, -2 are the byte 0xE3 in INT4, the bytes 0x03, 0xFE in INT8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AccumulatorFormat:
    """``threshold`` units are one threshold, values lie within +-``bound``."""

    dtype: torch.dtype
    threshold: int
    bound: int

    @property
    def per_entry(self) -> int:
        """Weights in an entry of the tensor."""
        return weights_per_entry(self.dtype)

    def zeros(self, num_weights: int, device: torch.device | str | None = None) -> torch.Tensor:
        """New accumulators of an even number of weights."""
        return torch.zeros(num_weights // self.per_entry, dtype=self.dtype, device=device)


INT8 = AccumulatorFormat(torch.int8, 64, 127)
INT4 = AccumulatorFormat(torch.uint8, 4, 7)
FP32 = AccumulatorFormat(torch.float32, 1, 2)
ACCUMULATOR_FORMATS = {"int8": INT8, "int4": INT4, "fp32": FP32}


def weights_per_entry(dtype: torch.dtype) -> int:
    """Of accumulators of this dtype."""
    return 2 if dtype == torch.uint8 else 1


def accumulated_values(accumulator: torch.Tensor) -> torch.Tensor:
    """One value a weight: int8 or fp32 (E,)."""
    if accumulator.dtype != torch.uint8:
        return accumulator
    return torch.stack([_upper_half(accumulator << 4), _upper_half(accumulator)], dim=-1).view(-1)


def accumulated_at(
    accumulator: torch.Tensor,
    elements: torch.Tensor,  # (C,) of an integer type
) -> torch.Tensor:
    """The values of some weights: int8 or fp32 (C,)."""
    if accumulator.dtype != torch.uint8:
        return accumulator[elements]
    return _upper_half(accumulator[elements // 2] << (4 - 4 * (elements % 2)).to(torch.uint8))


def set_accumulated(
    accumulator: torch.Tensor,  # changed in place
    elements: torch.Tensor,  # (C,) of an integer type, distinct
    values: torch.Tensor,  # (C,) fp32, within the bound
) -> None:
    """Give some weights other values, the nearest that the format has."""
    values = values if accumulator.dtype.is_floating_point else values.round()
    if accumulator.dtype != torch.uint8:
        accumulator[elements] = values.to(accumulator.dtype)
        return
    # A half stays within 0 .. 15 whatever is added to it here, so nothing carries into the other half of its byte.
    change = (values.int() & 15) - (accumulated_at(accumulator, elements).int() & 15)
    accumulator.index_add_(0, (elements // 2).int(), (change << (4 * (elements % 2))).to(torch.uint8))


def in_pairs(
    values: torch.Tensor,  # (E,) of a signed integer type, within -8 .. 7
) -> torch.Tensor:
    """Two values a byte: uint8 (E / 2,)."""
    lower, upper = (values & 15).to(torch.uint8).view(-1, 2).unbind(1)
    return lower | upper << 4


def _upper_half(pairs: torch.Tensor) -> torch.Tensor:
    """The value in the upper half of every byte: int8."""
    return pairs.view(torch.int8) >> 4

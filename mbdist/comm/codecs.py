"""How a segment of the Boolean signal is written for the wire."""

from __future__ import annotations

from typing import Protocol

import torch


class SignalCodec(Protocol):
    """Encodes fp32 signal segments; the owner decodes them to fp32 and adds them up in a fixed order."""

    def encode(self, segments: torch.Tensor) -> torch.Tensor:
        """(R, E) fp32 -> (R, L) of the wire's dtype."""

    def decode(self, wire: torch.Tensor) -> torch.Tensor:
        """(R, L) -> (R, E) fp32."""


class CastCodec:
    """Sends the signal in a float type: fp32 is the reference, bf16 halves it."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def encode(self, segments: torch.Tensor) -> torch.Tensor:
        return segments.to(self.dtype)

    def decode(self, wire: torch.Tensor) -> torch.Tensor:
        return wire.float()


CODECS: dict[str, SignalCodec] = {"fp32": CastCodec(torch.float32), "bf16": CastCodec(torch.bfloat16)}

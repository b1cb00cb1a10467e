"""GPUs and links that plans are made for: numbers of their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mbdist.errors import UserError


@dataclass(frozen=True)
class Gpu:
    memory_bytes: int
    bf16_flops: float  # dense, a second
    link_rate: float  # bytes a second and direction, to the others of its machine

    @property
    def usable_bytes(self) -> int:
        """What is left beside the CUDA context, NCCL and fragments."""
        return int(0.94 * self.memory_bytes)


GPUS = {
    "rtx4090-24g": Gpu(24 << 30, 165e12, 25e9),
    "l40s-48g": Gpu(48 << 30, 362e12, 25e9),
    "a100-40g": Gpu(40 << 30, 312e12, 300e9),
    "a100-80g": Gpu(80 << 30, 312e12, 300e9),
    "h100-80g": Gpu(80 << 30, 989e12, 450e9),
    "h200-141g": Gpu(141 * 10**9, 989e12, 450e9),
    "b200-192g": Gpu(192 * 10**9, 2250e12, 900e9),
}


def gpu_named(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"--gpu {name}: there is {', '.join(GPUS)}")
    return GPUS[name]


def link_rate(link: str) -> float:
    """Bytes a second of ``400gbit`` and the like."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mg])bit(?:/s)?", link.lower())
    if not found:
        raise UserError(f"--link {link}: give a machine's rate to the others, as in 400gbit or 1000mbit")
    return float(found[1]) * {"m": 1e6, "g": 1e9}[found[2]] / 8

"""How kernels are launched: block sizes and warps from a rule, or from the table that was measured on this kind of GPU.

Tables are JSON files in ``tuned/``, one a GPU, written by ``mbdist tune``: ``{operation: {bucket: settings}}``. There
is no autotuning at run time: ranks that tuned for themselves could add up in different orders.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned")
_tried: dict[str, dict] = {}


def settings(operation: str, rule: dict, bucket: str = "") -> dict:
    """The launch settings of an operation: those of the table of this GPU, else ``rule``."""
    return _tried.get(operation) or table(device_name()).get(operation, {}).get(bucket, rule)


@contextmanager
def trying(operation: str, chosen: dict) -> Iterator[None]:
    """Launch an operation with these settings, while they are measured."""
    _tried[operation] = chosen
    try:
        yield
    finally:
        del _tried[operation]


def blocks(num_rows: int, num_words: int, chosen: dict) -> tuple[int, int]:
    """The grid that covers rows and words of a plane with blocks of ``chosen``'s size."""
    return -(-num_rows // chosen["BLOCK_ROWS"]), -(-num_words // chosen["BLOCK_WORDS"])


@functools.cache
def device_name() -> str:
    """``nvidia_h100_80gb_hbm3``, say; ``cpu`` where there is no GPU."""
    return torch.cuda.get_device_name().lower().replace(" ", "_") if torch.cuda.is_available() else "cpu"


@functools.cache
def table(device: str) -> dict:
    """What was measured on a kind of device; empty where nothing was."""
    file = TUNED / f"{device}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

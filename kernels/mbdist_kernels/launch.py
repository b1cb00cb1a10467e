"""How operations run: block sizes, warps and crossovers from a rule, or from the table that was measured on this kind
of device.

Tables are JSON files in ``tuned/``, one a GPU and one for CPUs, written by ``mbdist tune``: ``{operation: {bucket:
settings}}``. There is no autotuning at run time, and the ranks of a run share one table (``use_table``): with settings
of their own they could add up in different orders.
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
_agreed: dict | None = None

_RULES = {
    "pack": {"BLOCK_ROWS": 4, "BLOCK_WORDS": 32, "num_warps": 4},
    "unpack": {"BLOCK_ROWS": 4, "BLOCK_WORDS": 32, "num_warps": 4},
    "popcount": {"BLOCK": 4096, "num_warps": 4},
    "xor_apply": {"BLOCK": 4096, "num_warps": 4},
    "vote": {"BLOCK": 1024, "num_warps": 4},
    "flip_update": {"BLOCK": 2048, "num_warps": 4},
    "candidate_mask": {"BLOCK_WORDS": 64, "num_warps": 4},
    "flip_apply_sparse": {"BLOCK": 1024, "num_warps": 4},
    "flip_mask": {"BLOCK": 1024, "num_warps": 4},
    "flip_encode_sparse": {"BLOCK_WORDS": 64, "num_warps": 4},
    "signal_encode": {"BLOCK_ROWS": 4, "BLOCK_WORDS": 32, "num_warps": 4},
    "column_square_sums": {"BLOCK_TOKENS": 64, "BLOCK_COLUMNS": 64, "num_warps": 4},
    "signal_accumulate": {"BLOCK_ROWS": 4, "BLOCK_WORDS": 16, "num_warps": 4},
    "row_codes": {"BLOCK_ROWS": 4, "BLOCK_WORDS": 32, "num_warps": 4},
    "dequantize": {"BLOCK_ROWS": 16, "BLOCK_WORDS": 16, "num_warps": 4},
    "linear_backward": {"BLOCK_ROWS": 64, "BLOCK_WORDS": 4, "num_warps": 4},
    "linear_decode": {"BLOCK_ROWS": 64, "BLOCKS_AT_A_TIME": 4, "SPLIT": 1, "num_warps": 4, "num_stages": 6},
    "linear_in_tiles": {"BLOCK_ROWS": 128, "BLOCK_TOKENS": 128, "BLOCK_WORDS": 2, "num_warps": 8, "num_stages": 3},
    "dense_from": {"tokens": 1536},  # a product that loses 18 % to the library breaks even with it
}
# Tokens by planes, measured on a core with AVX512-BF16. The packed way costs the same for every token and plane, the
# dense one little more than dequantising.
_DENSE_FROM_CPU = {1: 13, 2: 9, 3: 7, 4: 5}


def settings(operation: str, planes: int | None = None) -> dict:
    """The launch settings of an operation, for a number of planes where it matters: those of the table in use, else of
    the rule."""
    found = _tried.get(operation) or table().get(operation, {}).get(bucket(planes))
    return found or rule(operation, planes)


def bucket(planes: int | None) -> str:
    """The key of a table's settings."""
    return "" if planes is None else f"K={planes}"


def rule(operation: str, planes: int | None = None) -> dict:
    """What serves a device that was not measured."""
    if operation == "dense_from_cpu":
        return {"tokens": _DENSE_FROM_CPU[min(planes or 1, max(_DENSE_FROM_CPU))]}
    if operation == "linear_decode" and shared_memory_bytes() < 120_000:  # six stages of 20 KB
        return {**_RULES[operation], "num_stages": 3}
    if operation == "linear_in_tiles" and (planes or 0) > 3:  # 128 x 128 would not fit the registers
        return {**_RULES[operation], "BLOCK_ROWS": 64}
    return _RULES[operation]


@contextmanager
def trying(operation: str, chosen: dict) -> Iterator[None]:
    """Launch an operation with these settings, while they are measured."""
    _tried[operation] = chosen
    try:
        yield
    finally:
        del _tried[operation]


def blocks(num_rows: int, num_words: int, chosen: dict) -> tuple[int, int]:
    """How many blocks of ``chosen``'s size cover the rows, and the words, of a plane."""
    return -(-num_rows // chosen["BLOCK_ROWS"]), -(-num_words // chosen["BLOCK_WORDS"])


def grid(num_rows: int, num_words: int, chosen: dict) -> tuple[int]:
    """All of these blocks in one dimension, the only one of a launch without a small limit: see ``block_of``."""
    down, across = blocks(num_rows, num_words, chosen)
    return (down * across,)


def shared_memory_bytes() -> int:
    """What a block may have on the current GPU; on an H100 where there is none."""
    return _properties(torch.cuda.current_device())[1] if torch.cuda.is_available() else 232448


def device_name() -> str:
    """``nvidia_h100_80gb_hbm3``, say; ``cpu`` where there is no GPU."""
    return _properties(torch.cuda.current_device())[0] if torch.cuda.is_available() else "cpu"


@functools.cache
def _properties(device: int) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(device)
    return found.name.lower().replace(" ", "_"), getattr(
        found, "shared_memory_per_block_optin", found.shared_memory_per_block
    )


def table() -> dict:
    """The table in use: that of the current GPU, but where all ranks agreed on one."""
    return measured(device_name()) if _agreed is None else _agreed


def use_table(agreed: dict | None) -> None:
    """From now on launch with the settings of this table; None: with those of the current GPU's own."""
    global _agreed
    _agreed = agreed


@functools.cache
def measured(device: str) -> dict:
    """What was measured on a kind of device; empty where nothing was."""
    file = TUNED / f"{device}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

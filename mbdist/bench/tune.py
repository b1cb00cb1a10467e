"""``mbdist tune``: the launch settings that are fastest on this kind of GPU, as the table that kernels read.

A grid of block sizes and warps an operation, measured on one matrix for every number of planes; then from how many
tokens on a dense weight and the library's product beat tiles made in registers. Settings that do not fit the GPU
(shared memory, registers) are passed over. Inputs rotate through copies that no cache holds together.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources, PTXASError

import mbdist_kernels as kernels
from mbdist.bench.kernels import median_us, random_weight, rotated, signal_as_words
from mbdist_kernels.launch import TUNED, device_name, trying
from mbdist_kernels.linear_forward import linear_by_dense_weight, linear_in_tiles_triton

_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def tune(
    output: Path | None, shape: tuple[int, int] = (8192, 8192), planes: tuple[int, ...] = (1, 2, 3, 4)
) -> dict[str, dict]:
    """Measure and write the table; returns it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = output or TUNED / f"{device_name()}.json"
    console, table = Console(), {}
    for operation, bucket, calls, grid in _operations(shape, planes, device):
        found = {}
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            with trying(operation, chosen):
                try:
                    found[values] = median_us(calls, device)
                except (OutOfResources, PTXASError, RuntimeError) as error:
                    console.print(f"{operation} {bucket} {chosen}: passed over, {str(error).splitlines()[0]}")
        if not found:
            continue
        best = min(found, key=lambda values: found[values])
        table.setdefault(operation, {})[bucket] = dict(zip(grid, best, strict=True))
        _write(table, output)  # at once: what was measured stays
        spread = max(found.values()) / found[best]
        console.print(
            f"{operation} {bucket}: {found[best]:,.1f} us, the slowest settings take {spread:.1f} times as long"
        )
    table["dense_from"] = {
        f"K={count}": {"tokens": _dense_from(shape, count, device, table.get("linear_in_tiles", {}).get(f"K={count}"))}
        for count in planes
    }
    _write(table, output)
    console.print(f"written to {output}")
    return table


def _write(table: dict, output: Path) -> None:
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _operations(
    shape: tuple[int, int], planes: tuple[int, ...], device: torch.device
) -> Iterator[tuple[str, str, list[Callable], dict]]:
    """(operation, bucket, calls on rotated inputs, settings to try)."""
    m, n = shape
    of_blocks = {"BLOCK_ROWS": (4, 8, 16, 32), "BLOCK_WORDS": (8, 16, 32), "num_warps": (4, 8)}
    x = torch.randn(16, n, dtype=torch.bfloat16, device=device)
    more = torch.randn(512, n, dtype=torch.bfloat16, device=device)
    dense = rotated(torch.randn(m, n, dtype=torch.bfloat16, device=device))
    out = torch.empty_like(dense[0])
    for count in planes:
        bucket, (packed, *scales) = f"K={count}", random_weight(m, n, count, device)
        weights = [(list(copy), *scales) for copy in rotated(torch.stack(packed))]
        yield "dequantize", bucket, [partial(kernels.dequantize, *w, out=out) for w in weights], of_blocks
        decode = {"BLOCK_ROWS": (64, 128), "BLOCKS_AT_A_TIME": (4, 8), "SPLIT": (1, 2, 4)}
        decode |= {"num_warps": (4, 8), "num_stages": (3, 4, 6)}
        yield "linear_decode", bucket, [partial(kernels.linear_decode, x, *w) for w in weights], decode
        tiles = {"BLOCK_ROWS": (64, 128), "BLOCK_TOKENS": (64, 128), "BLOCK_WORDS": (1, 2)}
        tiles |= {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
        yield "linear_in_tiles", bucket, [partial(linear_in_tiles_triton, more, *w) for w in weights], tiles
        chunk = slice(0, min(m, 1024))  # of G, which comes from the product and is in the L2
        gradients = torch.empty_like(scales[0][:, chunk]), torch.zeros_like(scales[1])
        backward = partial(
            kernels.scale_gradients_and_signals,
            dense[0][chunk],
            [plane[chunk] for plane in packed],
            scales[0][:, chunk],
            scales[1],
            *gradients,
            [signal_as_words(m, n, device).rows(chunk)],
        )
        yield "linear_backward", bucket, [backward], of_blocks | {"BLOCK_ROWS": (16, 32, 64), "BLOCK_WORDS": (4, 8)}
    yield "pack", "", [partial(kernels.pack_signs, weight) for weight in dense], of_blocks
    words = rotated(packed[0])
    of_words = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8)}
    yield "xor_apply", "", [partial(kernels.xor_apply, copy, packed[0]) for copy in words], of_words
    ranks = rotated(torch.stack([packed[0].view(-1)] * 8))
    yield "vote", "", [partial(kernels.vote, copy) for copy in ranks], of_words
    elements = packed[0].numel() * 32
    signal = torch.randn(1, elements, device=device) * 0.01
    accumulators = rotated(torch.zeros(elements, dtype=torch.int8, device=device))
    update = [partial(kernels.accumulate_signal, state, signal, 32000, 1.0, [7], 0) for state in accumulators]
    yield "flip_update", "", update, of_words


def _dense_from(shape: tuple[int, int], planes: int, device: torch.device, tiles: dict | None) -> int:
    """The first of ``_TOKENS`` from which on the dense weight wins."""
    weight = random_weight(*shape, planes, device)
    wins = []
    for tokens in _TOKENS:
        x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=device)
        dense = median_us([partial(linear_by_dense_weight, x, *weight, None)], device)
        with trying("linear_in_tiles", tiles):
            wins.append(dense <= median_us([partial(linear_in_tiles_triton, x, *weight)], device))
    lost = max((i for i, won in enumerate(wins) if not won), default=-1)
    return _TOKENS[lost + 1] if lost + 1 < len(_TOKENS) else 2 * _TOKENS[-1]

"""``mbdist tune``: the settings that are fastest on this kind of device, as the table that operations read.

On a GPU a grid of block sizes and warps an operation, measured on one matrix for every number of planes; then from how
many tokens on a dense weight and the library's product beat tiles made in registers. Settings that do not fit the GPU
(shared memory, registers) are passed over. On a CPU, from how many tokens on they beat sums over packed words. Inputs
rotate through copies that no cache holds together.
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
from mbdist.errors import UserError
from mbdist_kernels import launch, native
from mbdist_kernels.launch import trying
from mbdist_kernels.linear_forward import linear_by_dense_weight, linear_in_tiles_triton

_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TOKENS_CPU = (2, 3, 4, 6, 8, 10, 12, 14, 16)
_PLANES = (1, 2, 3, 4)


def tune(output: Path | None) -> dict[str, dict]:
    """Measure and write the table; returns it. Raises UserError on a CPU without the accelerator."""
    output = output or launch.TUNED / f"{launch.device_name()}.json"
    if torch.cuda.is_available():
        return tune_kernels(output, torch.device("cuda"))
    if native.accelerator() is None:
        raise UserError("without a compiler for the accelerator a CPU has one way to multiply, and nothing to tune")
    return tune_cpu(output)


def tune_cpu(output: Path, shape: tuple[int, int] = (5120, 5120), planes: tuple[int, ...] = _PLANES) -> dict[str, dict]:
    """From how many tokens on a dense weight pays."""
    found = {}
    for count in planes:
        weight = random_weight(*shape, count, torch.device("cpu"))
        found[f"K={count}"] = {"tokens": _dense_from(weight, _TOKENS_CPU, kernels.linear_decode)}
    table = {"dense_from_cpu": found}
    _write(table, output)
    Console().print(f"{table}\nwritten to {output}")
    return table


def tune_kernels(
    output: Path, device: torch.device, shape: tuple[int, int] = (8192, 8192), planes: tuple[int, ...] = _PLANES
) -> dict[str, dict]:
    """Launch settings of all kernels, and from how many tokens on a dense weight pays."""
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
    found = {}
    for count in planes:
        with trying("linear_in_tiles", table.get("linear_in_tiles", {}).get(f"K={count}")):
            weight = random_weight(*shape, count, device)
            found[f"K={count}"] = {"tokens": _dense_from(weight, _TOKENS, linear_in_tiles_triton)}
    table["dense_from"] = found
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
    yield "signal_encode", "", [partial(kernels.signal_encode, signal.view(m, -1))], of_blocks
    accumulators = rotated(torch.zeros(elements, dtype=torch.int8, device=device))
    update = [partial(kernels.accumulate_signal, state, signal, 32000, 1.0, [7], 0) for state in accumulators]
    yield "flip_update", "", update, of_words


def _dense_from(
    weight: tuple,  # planes, scale_out, scale_in
    counts: tuple[int, ...],  # of tokens, in order
    other_way: Callable[..., torch.Tensor],  # takes x and the weight
) -> int:
    """The first of these counts from which on the dense weight wins; past them, where it does not."""
    device, wins = weight[1].device, []
    for tokens in counts:
        x = torch.randn(tokens, weight[2].shape[1], dtype=torch.bfloat16, device=device)
        dense = median_us([partial(linear_by_dense_weight, x, *weight, None)], device)
        wins.append(dense <= median_us([partial(other_way, x, *weight)], device))
    lost = max((i for i, won in enumerate(wins) if not won), default=-1)
    return counts[lost + 1] if lost + 1 < len(counts) else 2 * counts[-1]

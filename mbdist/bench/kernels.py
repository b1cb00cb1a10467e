"""``mbdist bench kernels``: every operation on packed planes beside its dense baseline and the floor of the memory.

A row is one operation on one matrix. Baseline: what does the same work on a dense bf16 weight with the library, on the
same device in the same run; empty where there is no such thing. Floor: the bytes that must move, at the rate at which
the device copies a large buffer in this run (twice its bytes over its time); for products of many tokens the dense
product itself. Inputs rotate through copies that no cache holds together. GemLite and BitBLAS stand beside one plane
where they are installed, and a second table says what an H100 should reach (``kernel_goals``).
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mbdist_kernels as kernels
from mbdist.bench.kernel_goals import goal_table
from mbdist.bench.other_kernels import OTHERS, why_not
from mbdist_kernels import ACCUMULATOR_FORMATS, Signal
from mbdist_kernels.accumulator import in_pairs
from mbdist_kernels.flip_update import candidate_mask
from mbdist_kernels.launch import device_name
from mbdist_kernels.linear_decode import MOST_TOKENS

_ROTATED_BYTES = 256 << 20  # more than any cache holds
_SECONDS = 0.4  # of measuring a call, on a CPU
SHAPES = {  # out x in: LLaMA-13B and LLaMA-2-70B; with a plus, matrices that take one input together
    "13b": ["5120x5120", "13824x5120", "5120x13824", "5120+5120+5120x5120", "13824+13824x5120"],
    "70b": ["8192x8192", "1024x8192", "28672x8192", "8192x28672", "8192+1024+1024x8192", "28672+28672x8192"],
}
SHAPE = r"[1-9]\d*(\+[1-9]\d*)*x[1-9]\d*"


# What rows may be called: those of a file that have another name are of code that is gone.
OPERATIONS = {
    "linear, forward",
    *(f"linear, forward: {other}" for other in OTHERS),
    "linear, dX",
    "linear, dW to signs and scales",
    "dequantize",
    "pack",
    "signal_encode",
    "xor_apply",
    "vote, 8 ranks",
    "flip_update, int8",
    "flip_update, int4",
}


@dataclass
class Measured:
    """One row; times are medians in microseconds."""

    op: str
    shape: str  # out x in, out + out x in
    planes: int
    batch: int  # tokens; 0 where there are none
    us: float
    baseline_us: float | None
    floor_us: float | None


def bench_kernels(shapes: list[str], planes: list[int], tokens: list[int], json_file: Path | None) -> list[dict]:
    """Measure, print the tables, write ``json_file`` where given (rows of the same device and torch that stand there
    and are not measured now are kept, but for operations that there are no more), and return what was measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = torch.zeros(_ROTATED_BYTES, dtype=torch.uint8, device=device)
    copy = median_us([partial(torch.empty_like(large).copy_, large)], device)
    bytes_per_us = 2 * _ROTATED_BYTES / copy
    console, rows = Console(), []
    table = Table("op", "shape", "planes", "batch", "us", "baseline us", "speed-up", "floor us", "of floor")
    console.print(f"{_describe(device)}; copies {bytes_per_us / 1e3:.1f} GB/s")
    for other in OTHERS:
        if reason := why_not(other):
            console.print(f"{other}: not measured, {reason}")
    for shape in shapes:
        *rows_of, n = map(int, re.split(r"[+x]", shape))
        for count in planes:
            if len(rows_of) > 1:
                measured = _measure_together(shape, rows_of, n, count, tokens, device, bytes_per_us)
            else:
                measured = _measure(*rows_of, n, count, tokens, device, bytes_per_us)
            for row in measured:
                rows.append(asdict(row))
                table.add_row(*_cells(row))
                if json_file is not None:  # at once: what was measured stays
                    _write(json_file, device, bytes_per_us, rows)
    console.print(table, goal_table(rows, device.type == "cuda"))
    return rows


def _write(json_file: Path, device: torch.device, bytes_per_us: float, rows: list[dict]) -> None:
    here = {"device": _describe(device), "torch": torch.__version__}
    before = json.loads(json_file.read_text(encoding="utf-8")) if json_file.exists() else {"rows": []}
    measured = {_what(row) for row in rows}
    same = all(before.get(key) == value for key, value in here.items())
    kept = [row for row in before["rows"] if same and row["op"] in OPERATIONS and _what(row) not in measured]
    result = here | {"copy_gb_s": bytes_per_us / 1e3, "rows": kept + rows}
    json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _what(row: dict) -> tuple:
    return row["op"], row["shape"], row["planes"], row["batch"]


def _cells(row: Measured) -> list[str]:
    speed_up = f"{row.baseline_us / row.us:.2f}" if row.baseline_us else ""
    floor = [f"{row.floor_us:,.0f}", f"{row.floor_us / row.us:.0%}"] if row.floor_us else ["", ""]
    baseline = f"{row.baseline_us:,.0f}" if row.baseline_us else ""
    return [row.op, row.shape, str(row.planes), str(row.batch or ""), f"{row.us:,.0f}", baseline, speed_up, *floor]


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return device_name()
    features = " avx512_bf16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else ""
    return f"cpu {platform.machine()}{features}, {torch.get_num_threads()} threads"


def median_us(calls: list[Callable[[], object]], device: torch.device) -> float:
    """Median time of a call, going round them."""
    if device.type == "cuda":
        import triton.testing

        # One graph of all calls: no launch latency is measured, and every call finds its inputs cold.
        return (
            1e3
            * triton.testing.do_bench_cudagraph(lambda: [call() for call in calls], return_mode="median")
            / len(calls)
        )
    times, turn = [], 0
    calls[0]()
    while sum(times) < _SECONDS or len(times) < 5:
        started = time.perf_counter()
        calls[turn % len(calls)]()
        times.append(time.perf_counter() - started)
        turn += 1
    return 1e6 * statistics.median(times)


def rotated(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Copies that no cache holds together."""
    return [tensor.clone() for _ in range(max(1, -(-_ROTATED_BYTES // tensor.nbytes)))]


def _measure(
    m: int, n: int, planes: int, tokens: list[int], device: torch.device, bytes_per_us: float
) -> Iterator[Measured]:
    shape, packed_bytes = f"{m}x{n}", _packed_bytes(m, n, planes)
    packed, *scales = random_weight(m, n, planes, device)
    weights = [(list(copy), *scales) for copy in rotated(torch.stack(packed))]
    dense = rotated(torch.randn(m, n, device=device, dtype=torch.bfloat16))

    dense_arguments = [(weight,) for weight in dense]
    signal = signal_as_words(m, n, device)

    def row(op, batch, calls, baseline, floor_bytes=None):
        us, baseline_us = median_us(calls, device), median_us(baseline, device) if baseline else None
        return Measured(
            op, shape, planes, batch, us, baseline_us, floor_bytes / bytes_per_us if floor_bytes else baseline_us
        )

    def over(operation, inputs, *first):
        return [partial(operation, *first, *given) for given in inputs]

    for batch in tokens:
        x = torch.randn(batch, n, device=device, dtype=torch.bfloat16)
        ours, library = over(kernels.linear_forward, weights, x), over(torch.nn.functional.linear, dense_arguments, x)
        if batch <= MOST_TOKENS:  # bound by reading the weight
            yield row("linear, forward", batch, ours, library, packed_bytes)
            if planes == 1:
                yield from _others(m, n, batch, len(weights), row, library)
            continue
        yield row("linear, forward", batch, ours, library)
        dy = torch.randn(batch, m, device=device, dtype=torch.bfloat16)
        ours, library = over(kernels.linear_backward_input, weights, dy), over(torch.mm, dense_arguments, dy)
        yield row("linear, dX", batch, ours, library)
        ours = over(kernels.linear_backward_weight, [(*w, [signal]) for w in weights], dy, x)
        yield row(
            "linear, dW to signs and scales", batch, ours, [partial(torch.mm, dy.T, x, out=torch.empty_like(dense[0]))]
        )
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    fill = over(partial(kernels.dequantize, out=out), weights)
    yield row("dequantize", 0, fill, over(out.copy_, dense_arguments), packed_bytes + 2 * m * n)
    if planes == 1:
        yield from _on_words(m, n, [weight[0][0] for weight in weights], dense, device, row, over)


def _packed_bytes(m: int, n: int, planes: int) -> int:
    """Words and scales."""
    return planes * (4 * m * kernels.words_per_row(n) + 4 * (m + n))


def _measure_together(
    shape: str, rows_of: list[int], n: int, planes: int, tokens: list[int], device: torch.device, bytes_per_us: float
) -> Iterator[Measured]:
    """Matrices that take one input, in one launch, for as many tokens as layers are decoded; the baseline has them as
    one dense matrix."""
    packed_bytes = sum(_packed_bytes(m, n, planes) for m in rows_of)
    weights = [random_weight(m, n, planes, device) for m in rows_of]
    copies = [
        [([plane.clone() for plane in packed], *scales) for packed, *scales in weights]
        for _ in range(-(-_ROTATED_BYTES // packed_bytes))
    ]
    dense = rotated(torch.randn(sum(rows_of), n, device=device, dtype=torch.bfloat16))
    for batch in tokens:
        if kernels.decodes(batch, torch.bfloat16, device, planes):
            x = torch.randn(batch, n, device=device, dtype=torch.bfloat16)
            ours = median_us([partial(kernels.linear_decode_together, x, copy) for copy in copies], device)
            library = median_us([partial(torch.nn.functional.linear, x, weight) for weight in dense], device)
            yield Measured("linear, forward", shape, planes, batch, ours, library, packed_bytes / bytes_per_us)


def _others(m, n, batch, copies, row, library) -> Iterator[Measured]:
    """GemLite and BitBLAS, where they run."""
    for other, calls_of in OTHERS.items():
        if why_not(other):
            continue
        try:
            yield row(f"linear, forward: {other}", batch, calls_of(m, n, batch, copies), library, m * n // 8)
        except Exception as error:  # whatever a foreign package raises, ours are still measured
            print(f"{other}, {m}x{n}, {batch} tokens: not measured, {type(error).__name__}: {error}")


def _on_words(m, n, words, dense, device, row, over) -> Iterator[Measured]:
    """Operations that know one plane at a time."""
    bits = words[0].nbytes
    yield row("pack", 0, over(kernels.pack_signs, [(w,) for w in dense]), [], 2 * m * n + bits)
    signals = rotated(dense[0].float())
    yield row("signal_encode", 0, over(kernels.signal_encode, [(s,) for s in signals]), [], 4 * m * n + bits)
    mask = torch.randint_like(words[0], 2)
    yield row("xor_apply", 0, over(kernels.xor_apply, [(plane, mask) for plane in words]), [], 3 * bits)
    ranks = rotated(torch.stack([words[0].view(-1)] * 8))
    yield row("vote, 8 ranks", 0, over(kernels.vote, [(copy,) for copy in ranks]), [], 9 * bits)
    yield from _flip_updates(words, dense[0], device, row, over)


def _flip_updates(words, dense, device, row, over) -> Iterator[Measured]:
    """The whole optimizer step of one contribution, against AdamW on a dense bf16 weight."""
    elements = 32 * words[0].numel()
    signal = _noise(elements, device).mul_(0.01)[None]
    weight, gradient = dense.clone(), torch.randn_like(dense)
    moments, step = (torch.zeros_like(weight), torch.zeros_like(weight)), torch.ones((), device=device)

    def adamw():
        torch._fused_adamw_(
            [weight], [gradient], [moments[0]], [moments[1]], [], [step], lr=1e-3, beta1=0.9, beta2=0.95,
            weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    for name in ("int8", "int4"):
        form = ACCUMULATOR_FORMATS[name]
        # One weight in a thousand past the threshold on the side that flips: 3.1 standard deviations.
        values = _noise(elements, device).mul_(form.threshold / 3.1).clamp_(-form.bound, form.bound).to(torch.int8)
        accumulators = rotated(in_pairs(values) if form.per_entry == 2 else values)

        def update(accumulator, plane, form=form):
            kernels.accumulate_signal(accumulator, signal, 32000, 1.0, [7], 0, form)
            if device.type == "cuda":  # a graph cannot wait for the number of flips
                mask = candidate_mask(accumulator, plane.view(-1), form)
            else:
                found, _ = kernels.find_candidates(accumulator, plane.view(-1), form)
                mask = kernels.flip_mask(found, plane.numel())
            kernels.xor_apply(plane, mask)

        pairs = list(zip(accumulators, words, strict=False))
        moved = elements * 4 + 2 * accumulators[0].nbytes + 3 * words[0].nbytes
        yield row(f"flip_update, {name}", 0, over(update, pairs), [adamw], moved)


def _noise(count: int, device: torch.device) -> torch.Tensor:
    """Normal, a million values over and over: drawing all of them would take longer than what is measured."""
    return torch.randn(1 << 20, device=device).repeat(-(-count >> 20))[:count]


def signal_as_words(m: int, n: int, device: torch.device) -> Signal:
    """A signal that is wanted as signs and magnitudes."""
    words = torch.empty(m, kernels.words_per_row(n), dtype=torch.int32, device=device)
    return Signal(*(torch.ones(size, device=device) for size in (m, n)), None, words, torch.empty(m, device=device))


def random_weight(m: int, n: int, planes: int, device: torch.device):
    packed = [kernels.pack_signs(torch.randn(m, n, device=device)) for _ in range(planes)]
    return packed, torch.rand(planes, m, device=device) + 0.5, torch.rand(planes, n, device=device) + 0.5

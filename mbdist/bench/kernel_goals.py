"""What the kernels should take on an H100, and what they took: the floor, the goal, the measurement.

Floors are bytes at 3.0 TB/s; a goal is microseconds, or a multiple of the dense bf16 product in the same run. Two are
sums of rows: all linear layers of LLaMA-2-70B for a token, and the three products of a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Goal:
    op: str
    shape: str
    planes: int
    batch: int
    floor_us: float | None
    most_us: float | None = None
    most_ratio: float | None = None  # to the baseline


SQUARE, WIDE = "8192x8192", "28672x8192"
OF_70B = ("8192+1024+1024x8192", SQUARE, "28672+28672x8192", "8192x28672")  # launches in each of its 80 blocks
STEP = ("linear, forward", "linear, dX", "linear, dW to signs and scales")
GOALS = [
    *(Goal("linear, forward", SQUARE, 1, batch, 2.8, 7) for batch in (1, 16)),
    *(Goal("linear, forward", WIDE, 1, batch, 9.8, 18) for batch in (1, 16)),
    Goal("linear, forward", WIDE, 1, 1, 9.8, most_ratio=1 / 8),
    *(Goal("linear, forward", SQUARE, 3, batch, 8.4, 18) for batch in (1, 16)),
    *(Goal("linear, forward", WIDE, 3, batch, 29.5, 50) for batch in (1, 16)),
    Goal("all linear layers", "70b", 1, 1, 2850, 5500),
    Goal("all linear layers", "70b", 3, 1, 8560, 15000),
    Goal("linear, forward", "5120x5120", 1, 1, 1.1, 5),
    Goal("linear, forward", "13824x5120", 1, 1, 2.95, 8),
    Goal("dequantize", SQUARE, 1, 0, 47.5, 60),
    Goal("dequantize", SQUARE, 3, 0, 53, 65),
    # Tiles: less than a dense weight and the library's product take.
    Goal("linear, forward", SQUARE, 1, 512, 86, 134),
    Goal("linear, forward", SQUARE, 1, 1024, 172, 219),
    Goal("linear, forward", SQUARE, 1, 8192, None, most_ratio=1.06),
    Goal("linear, dX", SQUARE, 1, 8192, None, most_ratio=1.06),
    Goal("linear, dW to signs and scales", SQUARE, 1, 8192, None, most_ratio=1.10),
    Goal("linear, dW to signs and scales", SQUARE, 3, 8192, None, most_ratio=1.12),
    Goal("forward, dX and dW", SQUARE, 1, 8192, None, most_ratio=1.10),
    Goal("flip_update, int8", SQUARE, 1, 0, 53, 85),
    Goal("vote, 8 ranks", SQUARE, 1, 0, 25, 35),
    Goal("xor_apply", SQUARE, 1, 0, 8.4, 12),
    Goal("pack", SQUARE, 1, 0, 47, 60),
]


def goal_table(rows: list[dict], on_gpu: bool) -> Table:
    """Every goal beside the row that answers it; ``rows`` as of ``bench_kernels``."""
    measured = {(row["op"], row["shape"], row["planes"], row["batch"]): row for row in rows if on_gpu}
    measured |= dict(_sums(measured))
    table = Table("goal on an H100", "shape", "planes", "batch", "floor us", "at most", "measured", "reached")
    for goal in GOALS:
        found, reached = "not measured", ""
        if row := measured.get((goal.op, goal.shape, goal.planes, goal.batch)):
            value, most = row["us"], goal.most_us
            if goal.most_ratio is not None:
                value, most = row["us"] / row["baseline_us"], goal.most_ratio
            found, reached = f"{value:,.2f}", "yes" if value <= most else "no"
        most = f"{goal.most_us:g} us" if goal.most_ratio is None else f"{goal.most_ratio:.3g} x dense"
        floor = "" if goal.floor_us is None else f"{goal.floor_us:g}"
        batch = str(goal.batch or "")
        table.add_row(goal.op, goal.shape, str(goal.planes), batch, floor, most, found, reached)
    return table


def _sums(measured: dict[tuple, dict]) -> Iterator[tuple[tuple, dict]]:
    """The rows of goals that are sums of other rows, where all of those were measured."""
    parts: dict[tuple, list[tuple[int, tuple]]] = {}
    for planes in {planes for _, _, planes, _ in measured}:
        of_model = [(80, ("linear, forward", shape, planes, 1)) for shape in OF_70B]
        parts["all linear layers", "70b", planes, 1] = of_model
        parts["forward, dX and dW", SQUARE, planes, 8192] = [(1, (op, SQUARE, planes, 8192)) for op in STEP]
    for whole, summed in parts.items():
        if all(key in measured for _, key in summed):
            times = ("us", "baseline_us")
            yield whole, {time: sum(count * measured[key][time] for count, key in summed) for time in times}

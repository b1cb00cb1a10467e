"""``mbdist bench scaling``: a step of a 70B model on more ranks than can be measured here, counted on paper."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mbdist.comm.step_bytes import TrainedModel, dense_step_bytes, llama_matrices, step_bytes
from mbdist.config.comm import CommConfig

_FLIP_RATE = 1e-4


def scaling_table(ranks: list[int], codec: str, planes: int, node_size: int) -> None:
    """Print GB that a rank sends in a step of one micro-batch; between machines where links inside are told apart."""
    model = TrainedModel(llama_matrices(80, 8192, 28672, 1024, planes))
    columns = (
        "ranks",
        "ZeRO",
        "signal",
        "signal, by machines",
        "planes",
        "flips",
        "floats",
        "all, flat",
        "dense",
        "ratio",
    )
    table = Table(
        *columns, title=f"LLaMA 70B, K = {planes}, {codec}, {_FLIP_RATE:g} flips a weight: GB a rank and step"
    )
    for count in ranks:
        for stage in (2, 3):
            flat = step_bytes(model, count, stage, CommConfig(codec=codec), flip_rate=_FLIP_RATE)
            nodes = step_bytes(model, count, stage, CommConfig(codec=codec, node_size=node_size), flip_rate=_FLIP_RATE)
            total, dense = sum(flat.values()), dense_step_bytes(model, count, stage)
            floats = flat["statistics"] + flat["flip_counts"] + flat["float gradients"] + flat["floats"]
            sizes = (flat["signal"], nodes["signal"], flat.get("planes", 0), flat.get("flips", 0), floats, total, dense)
            table.add_row(str(count), str(stage), *(f"{size / 1e9:.2f}" for size in sizes), f"{dense / total:.1f}")
    Console(width=140).print(table)

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import Overrides

app = typer.Typer(
    help="Measure; every result is a ratio against a named baseline of the same run.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Measure; every result is a ratio against a named baseline of the same run."""


@app.command()
def train(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config whose model, data, batch and loss are used.")] = (
        "configs/quickstart.yaml"
    ),
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each kind.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """A Boolean finetuning step against the same model's dense bf16 step (DeepSpeed AdamW, same batch, same loss).

    Example: `mbdist bench train --steps 5 --json train.json`
    """
    from mbdist.bench.train import bench_train
    from mbdist.config import load_config

    bench_train(load_config(config, overrides or []), steps, json_file)

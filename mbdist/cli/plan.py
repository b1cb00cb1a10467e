from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import Overrides, RunFile, check_folder


def plan(
    run: RunFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, as h100-80g; `cpu` for none.")] = "h100-80g",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Workers a machine. Default: cluster.workers shared evenly.")
    ] = None,
    link: Annotated[str, typer.Option(help="Rate of a machine's link to the others, as 400gbit.")] = "100gbit",
    rates: Annotated[
        Path | None, typer.Option(help="JSON of `mbdist bench kernels` on such a GPU (or CPU). Default: data sheets.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here too.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also start the run's real code, with workers and tensors that are fake.")
    ] = False,
) -> None:
    """Memory, bytes and seconds of a run before it starts: from its config alone, without weights or GPUs.

    Exit code 1 where it does not fit. Settings of a config that fit another number of workers are replaced as on
    `mbdist train`.

    Example: `mbdist plan configs/llama2_70b_ray.yaml --gpu h100-80g --nodes 2 --gpus-per-node 8 --link 400gbit`
    """
    from mbdist.config import load_config
    from mbdist.plan.command import plan_command

    check_folder(json_file)
    workers = nodes * gpus_per_node if gpus_per_node is not None else None
    changes = [*(overrides or []), *([f"cluster.workers={workers}"] if workers is not None else [])]
    if not plan_command(load_config(run, changes), gpu, nodes, link, dry_run, rates, json_file):
        raise typer.Exit(1)

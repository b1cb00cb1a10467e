from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tune(
    output: Annotated[
        Path | None, typer.Option(help="Table to write. Default: the one of this kind of device that kernels read.")
    ] = None,
) -> None:
    """Measure the launch settings of the kernels on this GPU and write their table. Once a kind of GPU; some minutes.
    On a CPU: from how many tokens on a dense weight pays; a minute.

    It decides in which order sums are taken, so all workers of a run take over the table of worker 0: other nodes need
    no copy.

    Example: `mbdist tune`
    """
    from mbdist.bench.tune import tune

    tune(output)

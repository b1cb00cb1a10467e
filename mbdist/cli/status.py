from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, going on or ended.")],
) -> None:
    """Show how a run is doing, from its folder: on this machine or on storage that it shares with the run's.

    Example: `mbdist status runs/quickstart`
    """
    from mbdist.train.status import describe_run

    print(describe_run(run))

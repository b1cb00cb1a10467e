"""Opening the folder of a run."""

from __future__ import annotations

from pathlib import Path

from mbdist.config import RunConfig, write_config
from mbdist.errors import UserError


def open_run_folder(config: RunConfig) -> RunConfig:
    """Make the folder, write the resolved config into it, clear the metrics of an earlier run.

    Returns the config with the folder's absolute path, which holds in every process of the run.
    """
    folder = Path(config.run_dir).resolve()
    config = config.model_copy(update={"run_dir": str(folder)})
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_config(config, folder / "config.yaml")
        for old in ("metrics.jsonl", "summary.json"):
            (folder / old).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to run_dir {folder}: {error.strerror or error}") from None
    return config

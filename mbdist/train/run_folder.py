"""Opening the folder of a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mbdist.checkpoint import complete_checkpoints, latest_checkpoint
from mbdist.config import RunConfig, write_config
from mbdist.errors import Interrupted, UserError
from mbdist.train.metrics import MetricsWriter
from mbdist.train.stop_signals import stop_file

_locks: dict[Path, int] = {}  # held until this process ends, however it ends


def open_run_folder(config: RunConfig) -> RunConfig:
    """Make the folder, keep other runs out of it, write the resolved config into it; clear what an earlier run left,
    unless this one goes on from its checkpoint.

    Returns the config with the folder's absolute path, which holds in every process of the run.
    """
    folder = Path(config.run_dir).resolve()
    config = config.model_copy(update={"run_dir": str(folder)})
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        _lock(folder)
        resumes = _settle_checkpoints(config)
        write_config(config, folder / "config.yaml")
        (folder / "summary.json").unlink(missing_ok=True)
        stop_file(config.run_dir).unlink(missing_ok=True)
        if not resumes:
            for log in (folder / "logs").iterdir():
                log.unlink()
            (folder / "metrics.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to run_dir {folder}: {error.strerror or error}") from None
    return config


def checkpoint_folder(config: RunConfig) -> Path:
    return Path(config.run_dir) / "checkpoints"


def starting_checkpoint(config: RunConfig) -> Path | None:
    """For the workers of an opened folder: the run's own newest checkpoint, which a restarted worker has too, or the
    one that the config names until there is one."""
    own = latest_checkpoint(checkpoint_folder(config))
    if own is None and config.checkpoint.resume not in ("auto", "none"):
        return Path(config.checkpoint.resume)
    return own


@contextlib.contextmanager
def noting_how_it_ends(config: RunConfig) -> Iterator[None]:
    """Leave in the metrics file of an opened folder why the run did not come to its end."""
    try:
        yield
    except Interrupted as stopped:
        MetricsWriter(Path(config.run_dir) / "metrics.jsonl").write("stopped", step=stopped.step)
        raise
    except Exception as error:
        MetricsWriter(Path(config.run_dir) / "metrics.jsonl").write("failed", error=str(error))
        raise


def is_locked(folder: Path) -> bool:
    """Whether a run is going on in the folder, as far as this machine can see."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def _settle_checkpoints(config: RunConfig) -> bool:
    """Remove the checkpoints that this run does not go on from; whether it goes on from one of its folder's own."""
    folder = checkpoint_folder(config)
    finished = (Path(config.run_dir) / "summary.json").exists()
    match config.checkpoint.resume:
        case "auto" if not finished and latest_checkpoint(folder) is not None:
            return True
        case "auto" | "none":
            shutil.rmtree(folder, ignore_errors=True)
            return False
        case path:
            return _settle_for(Path(path).resolve(), folder)


def _settle_for(wanted: Path, folder: Path) -> bool:
    own = complete_checkpoints(folder)
    if wanted.parent == folder.resolve() and wanted.name in [found.name for found in own]:
        for newer in own[[found.name for found in own].index(wanted.name) + 1 :]:
            shutil.rmtree(newer)
        return True
    if not wanted.is_dir():
        raise UserError(
            f"checkpoint.resume = {wanted}: there is no such folder; give auto, none or a checkpoint's folder"
        )
    if own:
        raise UserError(
            f"checkpoint.resume = {wanted}, but run_dir has checkpoints of its own, the newest {own[-1]}: use another "
            "run_dir, or checkpoint.resume=auto"
        )
    return False


def _lock(folder: Path) -> None:
    """Raises UserError while another process has the folder."""
    if folder in _locks:
        return
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another run is going on in run_dir {folder}: give this one a folder of its own") from None
    _locks[folder] = handle

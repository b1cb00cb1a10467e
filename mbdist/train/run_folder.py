"""Opening the folder of a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mbdist.checkpoint import complete_checkpoints, latest_checkpoint, remove_checkpoint
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


def _start_file(config: RunConfig) -> Path:
    """Names the checkpoint that the run was told to start from. One of another run's it stays the start of; one of the
    run's own is its newest once it has gone on from there."""
    return checkpoint_folder(config) / "start_from"


def starting_checkpoint(config: RunConfig) -> Path | None:
    """For the workers of an opened folder: the checkpoint that the run was told to start from, and once it has, the
    newest of its own."""
    own = latest_checkpoint(checkpoint_folder(config))
    if _start_file(config).exists():
        told = Path(_start_file(config).read_text())
        if own is None or told.parent == own.parent:
            return told
    return own


def go_on_from(config: RunConfig, checkpoint: Path | None) -> None:
    """For the first worker, whose state is that of ``checkpoint``: what was saved after it does not count any more."""
    own = complete_checkpoints(checkpoint_folder(config))
    if checkpoint in own:
        for newer in own[own.index(checkpoint) + 1 :]:
            remove_checkpoint(newer)
        _start_file(config).unlink(missing_ok=True)


@contextlib.contextmanager
def noting_how_it_ends(config: RunConfig) -> Iterator[None]:
    """Leave in the metrics file of an opened folder why the run did not come to its end."""
    try:
        yield
    except Exception as error:
        note_end(config, error)
        raise


def note_end(config: RunConfig, error: Exception) -> None:
    metrics = MetricsWriter(Path(config.run_dir) / "metrics.jsonl")
    if isinstance(error, Interrupted):
        metrics.write("stopped", step=error.step)
    else:
        metrics.write("failed", error=str(error))


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
    """Decide where the run starts; whether it goes on with what its folder has."""
    folder, start_file = checkpoint_folder(config), _start_file(config)
    own = complete_checkpoints(folder)
    finished = (Path(config.run_dir) / "summary.json").exists()
    match config.checkpoint.resume:
        case "auto" if not finished and (own or start_file.exists()):
            return True
        case "auto" | "none":
            for each in own:
                remove_checkpoint(each)
            start_file.unlink(missing_ok=True)
            return False
    wanted = Path(config.checkpoint.resume).resolve()
    if not wanted.is_dir():
        raise UserError(
            f"checkpoint.resume = {wanted}: there is no such folder; give auto, none or a checkpoint's folder"
        )
    if own and wanted.parent != folder.resolve():
        if start_file.exists() and start_file.read_text() == str(wanted):
            return True  # the same command again
        raise UserError(
            f"checkpoint.resume = {wanted}, but run_dir has checkpoints of its own, the newest {own[-1]}: use another "
            "run_dir, or checkpoint.resume=auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    start_file.write_text(str(folder / wanted.name if own else wanted))
    return bool(own)


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

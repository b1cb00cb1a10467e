"""Opening the folder of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mbdist.checkpoint import (
    changed_settings,
    complete_checkpoints,
    latest_checkpoint,
    read_state,
    remove_checkpoint,
)
from mbdist.config import RunConfig, write_config
from mbdist.errors import Interrupted, UserError
from mbdist.file_lock import take_lock
from mbdist.train.metrics import MetricsWriter
from mbdist.train.stop_signals import stop_file

LOCK = ".lock"
_locks: dict[Path, TextIO] = {}  # held until this process ends, however it ends


def open_run_folder(config: RunConfig) -> RunConfig:
    """Make the folder, keep other runs out of it, write the resolved config into it; clear what an earlier run left,
    unless this one goes on from its checkpoint.

    Returns the config with the folder's absolute path, which holds in every process of the run. Raises UserError
    where the folder cannot be written, or the checkpoint to start from is of another run: all in it stays as it was.
    """
    folder = Path(config.run_dir).resolve()
    config = config.model_copy(update={"run_dir": str(folder)})
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        _lock(folder)
        start, found = _choose_start(config), starting_checkpoint(config)
        if start is not None:
            changed_settings(start, read_state(start), config)
        _settle_checkpoints(config, start, found)
        write_config(config, folder / "config.yaml")
        (folder / "summary.json").unlink(missing_ok=True)
        stop_file(config.run_dir).unlink(missing_ok=True)
        if start is None or found is None:
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


def _choose_start(config: RunConfig) -> Path | None:
    """The checkpoint that the run is to start from; None where it starts anew. Nothing is written."""
    folder, start_file = checkpoint_folder(config), _start_file(config)
    finished = (Path(config.run_dir) / "summary.json").exists()
    match config.checkpoint.resume:
        case "none":
            return None
        case "auto":
            return None if finished else starting_checkpoint(config)
    wanted = Path(config.checkpoint.resume).resolve()
    if not wanted.is_dir():
        raise UserError(
            f"checkpoint.resume = {wanted}: there is no such folder; give auto, none or a checkpoint's folder"
        )
    own = complete_checkpoints(folder)
    if not own or wanted.parent == folder.resolve():
        return folder / wanted.name if own else wanted
    if start_file.exists() and start_file.read_text() == str(wanted):
        return own[-1]  # the same command again
    raise UserError(
        f"checkpoint.resume = {wanted}, but run_dir has checkpoints of its own, the newest {own[-1]}: use another "
        "run_dir, or checkpoint.resume=auto"
    )


def _settle_checkpoints(config: RunConfig, start: Path | None, found: Path | None) -> None:
    """Have the workers find ``start``, who would find ``found``."""
    if start is None:
        for each in complete_checkpoints(checkpoint_folder(config)):
            remove_checkpoint(each)
        _start_file(config).unlink(missing_ok=True)
    elif start != found:
        checkpoint_folder(config).mkdir(parents=True, exist_ok=True)
        _start_file(config).write_text(str(start))


def _lock(folder: Path) -> None:
    """Raises UserError while another process has the folder."""
    if folder in _locks:
        return
    lock = take_lock(folder / LOCK)
    if lock is None:
        raise UserError(f"another run is going on in run_dir {folder}: give this one a folder of its own")
    _locks[folder] = lock

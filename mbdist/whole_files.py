"""Files and folders that are there whole or not at all: an interrupted write never costs what was there before."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from mbdist.errors import UserError


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside ``target``; it takes target's place only once everything is written and synced.

    Raises UserError where the disk is full or the place cannot be written; whatever was at ``target`` stays whole.
    """
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with clear_disk_errors(target):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def clear_disk_errors(target: Path) -> Iterator[None]:
    """Turns what writing ``target`` may end in, a full disk say, into one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        kept = "; the previous save is unharmed" if target.exists() else ""
        raise UserError(f"cannot save to {target}: {getattr(error, 'strerror', None) or error}{kept}") from error


def put_in_place(beside: Path, target: Path) -> None:
    """Sync a folder and rename it to ``target``, whose place it takes."""
    for file in beside.rglob("*"):
        if file.is_file():
            fsync(file)
    retired = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(retired)
    try:
        beside.rename(target)
    except BaseException:
        if retired.exists():
            retired.rename(target)
        raise
    fsync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def fsync(path: Path) -> None:
    """Have a file, or the entries of a folder, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, content: bytes) -> None:
    """Beside first, then renamed: a reader finds all of it or nothing."""
    beside = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(content)
        fsync(beside)
        beside.rename(file)
    finally:
        beside.unlink(missing_ok=True)

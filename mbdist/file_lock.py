"""Keeps other processes away from a folder while this one lives: a process that is killed leaves no lock behind."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import TextIO

_log = logging.getLogger(__name__)


def take_lock(file: Path) -> TextIO | None:
    """The lock, to be kept open as long as it is to hold; None while another process has it.

    Some storage of clusters knows no locks: a warning says that nobody is kept away there.
    """
    lock = file.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        _log.warning("mbdist: nobody is kept out of %s, whose storage has no locks: %s", file.parent, error)
    return lock


def is_locked(file: Path) -> bool:
    """Whether a process has the lock, as far as this machine can see."""
    try:
        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

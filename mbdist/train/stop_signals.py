"""A run that is told to stop does so between steps, between batches of an evaluation or layers of a conversion.

Told by SIGTERM, or SIGUSR1 as SLURM warns of preemption: to a worker, or to a launcher, which leaves a file for its
workers, who may be on other machines.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_EVERY_S = 0.2  # for the file, on storage that may be far away


_early = threading.Event()


def remember_preemption() -> None:
    """Have SIGUSR1, from the start of a process on, wait for ``on_stop_signals`` instead of ending it: imports and
    rendezvous take their time."""
    signal.signal(signal.SIGUSR1, lambda *_: _early.set())


def on_stop_signals(act: Callable[[], None]) -> None:
    """Have stop signals to this process do this instead of ending it."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, lambda *_: act())
        if _early.is_set():
            act()


def stop_file(run_dir: str) -> Path:
    """Its presence tells the workers of a run to stop."""
    return Path(run_dir) / "stop"


class StopRequest:
    """Remembers that this worker was told to stop, by a signal or by the file that every worker of the run sees."""

    def __init__(self, file: Path):
        self._told = threading.Event()
        self._file = file
        self._next_look_s = 0.0
        on_stop_signals(self._told.set)

    @property
    def seen(self) -> bool:
        if not self._told.is_set() and time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + _LOOK_EVERY_S
            if self._file.exists():
                self._told.set()
        return self._told.is_set()

    def pass_on(self) -> None:
        """Tell the others too, where they do not ask together."""
        self._file.touch()

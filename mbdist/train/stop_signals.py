"""A worker that is told to stop (SIGTERM, or SIGUSR1 as SLURM warns of preemption) does so where all workers can."""

from __future__ import annotations

import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers that a signal came; the trainer asks between steps."""

    def __init__(self) -> None:
        self._seen = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, lambda *_: self._seen.set())

    @property
    def seen(self) -> bool:
        return self._seen.is_set()

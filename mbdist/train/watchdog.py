"""Ends a worker that hangs: a launcher replaces a worker that failed, and waits forever for one that does nothing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from mbdist.comm.activity import Activity


class Watchdog:
    """Watches ``activity`` in a thread. After ``limit_s`` seconds without a change the process ends with exit code 1,
    having said in its log what it was doing, with the stack of every thread."""

    def __init__(self, limit_s: float, rank: int, activity: Activity):
        self._limit_s = limit_s
        self._rank = rank
        self._activity = activity
        self._done = threading.Event()
        activity.enter(activity.phase)
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit_s / 4)):
            idle = time.monotonic() - self._activity.since
            if idle > self._limit_s:
                print(
                    f"worker {self._rank} hangs: for {idle:.0f} s in {self._activity} (train.hang_timeout_s = "
                    f"{self._limit_s:g}). What every thread of it is doing:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)

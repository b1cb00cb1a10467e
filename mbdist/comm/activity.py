"""What a worker is doing at this moment, for whoever finds that it does nothing else any more."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator


class Activity:
    """Updated as work goes on; read by other threads."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.waits_for: str | None = None
        self.since = time.monotonic()  # of the last change

    def enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    @contextlib.contextmanager
    def unwatched(self, phase: str) -> Iterator[None]:
        """While something goes on that may take any time and shows no progress."""
        self.phase, self.since = phase, math.inf
        try:
            yield
        finally:
            self.enter(phase)

    @contextlib.contextmanager
    def waiting(self, message: str) -> Iterator[None]:
        """While this worker waits for others."""
        self.waits_for, self.since = message, time.monotonic()
        yield  # where it raises, what it waited for stays
        self.waits_for, self.since = None, time.monotonic()

    def __str__(self) -> str:
        return self.phase + (f", waiting for the other workers in {self.waits_for}" if self.waits_for else "")

"""Machines that are about to be taken from a run, as far as its launcher is warned: it saves once before they go, and
goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

_EVERY_S = 5.0  # to ask takes a message between processes


class LeavingNodes:
    """Asks now and then, until it is told so."""

    def __init__(self, ask: Callable[[], bool] | None):  # None: nobody knows
        self._ask = ask
        self._next_s = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to ask, as rank 0 sees it: it tells the others."""
        return self._ask is not None and time.monotonic() >= self._next_s

    def asked(self) -> bool:
        """The answer. All ranks ask together."""
        self._next_s = time.monotonic() + _EVERY_S
        told = self._ask()
        if told:
            self._ask = None
        return told

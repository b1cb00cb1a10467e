"""Tensors without memory: the real code runs on them, and what it would hold is counted.

torch's ``FakeTensorMode`` gives every operation's result its shape and no storage. ``LiveMemory`` watches the storages
come and go.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}  # by storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.device.type != "meta":  # which shall have no memory
                self._see(result.untyped_storage())
        return results

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)

    def restart_peak(self) -> int:
        """Measure the peak from here on; bytes live now."""
        self.peak_bytes = self.live_bytes
        return self.live_bytes


def with_fake_tensors(function: Callable[[LiveMemory], Result]) -> Result:
    """``function(memory)`` where every tensor made is a fake one, and counted.

    In a thread of its own: scratch memory that operations keep is kept by thread, and a fake one must not stay behind.
    """
    outcome: list[Result | BaseException] = []

    def run() -> None:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
                outcome.append(function(memory))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]

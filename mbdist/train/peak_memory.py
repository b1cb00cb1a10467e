"""The most memory that this worker held at a time: of the GPU, or of the process besides what it began with."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from mbdist.free_memory import give_back

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its start on. On a CPU the kernel counts (Linux alone)."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        give_back()
        self._before = 0 if self._on_gpu else psutil.Process().memory_info().rss

    def restart(self) -> None:
        """Forget how much it was until now."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        give_back()
        if sys.platform == "linux":
            _RESET.write_text("5")  # sets the peak to what is resident now

    def peak_bytes(self) -> int:
        """Since the last restart."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return _most_resident() - self._before


def _most_resident() -> int:
    if sys.platform != "linux":
        return psutil.Process().memory_info().rss
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

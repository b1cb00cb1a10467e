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
        self._before = 0 if self._on_gpu else resident_bytes()[0]

    def restart(self) -> None:
        """Forget how much it was until now."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        give_back()
        forget_peak()

    def peak_bytes(self) -> int:
        """Since the last restart."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return resident_bytes()[1] - self._before


def resident_bytes() -> tuple[int, int]:
    """Of this process, now and at most since its start or ``forget_peak`` (which Linux alone knows)."""
    if sys.platform != "linux":
        now = psutil.Process().memory_info().rss
        return now, now
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    kib = {line[0]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:")}
    return 1024 * kib["VmRSS:"], 1024 * kib["VmHWM:"]


def forget_peak() -> None:
    """What is resident now is the most."""
    if sys.platform == "linux":
        _RESET.write_text("5")

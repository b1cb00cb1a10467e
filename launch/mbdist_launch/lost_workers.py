"""Notes why Ray starts the workers of a run again: what kills a worker leaves it no time to say so itself."""

from __future__ import annotations

from pathlib import Path

from ray.train import UserCallback

from mbdist.train.metrics import MetricsWriter

_LONGEST = 300  # characters of a cause; all of it is in the workers' logs, or Ray's


class LostWorkers(UserCallback):
    """Runs beside Ray Train's controller."""

    def __init__(
        self,
        metrics: Path,
        ended: Path,  # there where the workers said themselves why the run ends
    ):
        self._metrics, self._ended = metrics, ended

    def after_exception(self, run_context, worker_exceptions: dict[int, Exception]) -> None:
        if self._ended.exists():
            return
        causes = {rank: str(error).strip().splitlines() for rank, error in sorted(worker_exceptions.items())}
        described = [f"worker {rank} was lost: {lines[-1][:_LONGEST]}" for rank, lines in causes.items() if lines]
        MetricsWriter(self._metrics).write("workers_lost", workers=sorted(causes), error="; ".join(described))

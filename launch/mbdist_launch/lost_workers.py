"""When workers fail, beside Ray Train's controller: a loss is noted and Ray starts them again; not for what the user
has to mend."""

from __future__ import annotations

from pathlib import Path

from ray.train import UserCallback

from mbdist.errors import RunError
from mbdist.train.metrics import MetricsWriter

_LONGEST = 300  # characters of a cause; all of it is in the workers' logs, or Ray's


class LostWorkers(UserCallback):
    """Writes why workers were lost into the metrics: what kills a worker leaves it no time to say so itself."""

    def __init__(
        self,
        metrics: Path,
        ended: Path,  # there where the workers said themselves why the run ends
    ):
        self._metrics, self._ended = metrics, ended

    def after_exception(self, run_context, worker_exceptions: dict[int, Exception]) -> None:
        if self._ended.exists():
            raise RunError("the workers have said why the run ends")  # which is the controller's end, too
        causes = {rank: str(error).strip().splitlines() for rank, error in sorted(worker_exceptions.items())}
        described = [f"worker {rank} was lost: {lines[-1][:_LONGEST]}" for rank, lines in causes.items() if lines]
        MetricsWriter(self._metrics).write("workers_lost", workers=sorted(causes), error="; ".join(described))

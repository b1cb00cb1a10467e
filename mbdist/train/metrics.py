"""``metrics.jsonl``: one JSON object a line, written by rank 0, read by progress bars and summaries alike."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from mbdist.train.trackers import Log, scalars


class MetricsWriter:
    """Appends events; every line is flushed, so a reader sees it at once."""

    def __init__(self, path: Path, active: bool = True):
        self._file = path.open("a", encoding="utf-8") if active else None
        self._trackers: list[Log] = []

    def copy_to(self, trackers: list[Log]) -> None:
        """Give them the numbers of every step and evaluation from now on."""
        self._trackers = trackers

    def write(self, event: str, **values) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
            self._file.flush()
        if self._trackers and (shown := scalars(event, values)):
            for log in self._trackers:
                log(shown, values["step"])


def read_metrics(path: Path) -> Iterator[dict]:
    """The complete lines of a metrics file, in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)

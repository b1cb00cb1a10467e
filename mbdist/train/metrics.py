"""``metrics.jsonl``: one JSON object a line, written by rank 0, read by progress bars and summaries alike."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mbdist.train.trackers import Log, scalars


class MetricsWriter:
    """Appends events; every line is flushed, so a reader sees it at once."""

    def __init__(self, path: Path, active: bool = True):
        self._path = path
        self._file = path.open("a", encoding="utf-8") if active else None
        self._torn = False  # whether the file may end within a line
        self._trackers: list[Log] = []

    def copy_to(self, trackers: list[Log]) -> None:
        """Give them the numbers of every step and evaluation from now on."""
        self._trackers = trackers

    def write(self, event: str, **values) -> None:
        if self._file is not None:
            try:
                self._file.write("\n" * self._torn)
                self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
                self._file.flush()
                self._torn = False
            except OSError as error:  # a full disk above all: the run must go on
                print(f"a line of {self._path} is lost: {error}", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):  # what is in the buffer would be tried again
                    self._file.close()
                self._file, self._torn = self._path.open("a", encoding="utf-8"), True
        if self._trackers and (shown := scalars(event, values)):
            for log in self._trackers:
                log(shown, values["step"])


def parse_line(line: str) -> dict | None:
    """None for a line that a full disk cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_metrics(path: Path) -> Iterator[dict]:
    """The complete lines of a metrics file, in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and (record := parse_line(line)) is not None:
                yield record

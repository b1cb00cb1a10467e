"""Shows a run while it goes on, from its ``metrics.jsonl``: a progress bar on a terminal, plain lines elsewhere.

The process that watches need not be one that trains: the launcher's driver watches what Ray's workers do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mbdist.train.metrics import parse_line

_POLL_S = 0.3
_PLAIN_LINES = 20  # about so many step lines a run where there is no terminal

_SAYS = {
    "loading": "loading {model}",
    "converting": "converting to {goal} ({init})",
    "converted": "converted {layers} layers: {bits_per_weight:.2f} bits a weight, "
    "mean relative error {mean_relative_error:.3f}",
    "prepared": "the converted model of an earlier run with the same settings is reused",
    "tokenized": "data: {train_windows} training windows, {eval_windows} held out",
    "start": "{world_size} worker(s) on {device}, ZeRO stage {zero_stage}, {precision}, micro-batch {micro_batch} x "
    "{accumulation}, signal as {codec}, {trained_weights:,} trained weights, about {memory_predicted} a worker",
    "resumed": "resumed after step {step} from {folder}",
    "checkpoint": "checkpoint after step {step} in {seconds:.1f} s",
    "checkpoint_failed": "WARNING: no checkpoint after step {step}: {why}",
    "eval": "perplexity, {name}: {perplexity:,.2f}",
    "memory": "memory: {measured} a worker at the most, {predicted} predicted",
    "workers_lost": "WARNING: {error}",
    "memory_is_short": "WARNING: the workers will take about {needed} of {where}, which has {free} free",
    "saved": "saved {folder}",
}


class RunWatcher:
    """Context manager: follows the metrics file in a thread until the block ends."""

    def __init__(self, metrics: Path, console: Console | None = None):
        self.metrics = metrics
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._progress: Progress | None = None
        self._steps = 0
        self._position = metrics.stat().st_size if metrics.exists() else 0  # what a resumed run logged before is known

    def __enter__(self) -> RunWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self._stop_bar()

    def _follow(self) -> None:
        position, rest = self._position, ""
        while True:
            last_round = self._done.is_set()
            if self.metrics.exists():
                with self.metrics.open(encoding="utf-8") as file:
                    file.seek(position)
                    text = rest + file.read()
                    position = file.tell()
                *lines, rest = text.split("\n")
                for line in lines:
                    if (record := parse_line(line)) is not None:
                        self._show(record)
            if last_round:
                return
            self._done.wait(_POLL_S)

    def _show(self, record: dict) -> None:
        event = record["event"]
        if event == "step":
            self._show_step(record)
            return
        if event == "start":
            self._steps = record["steps"]
            record["memory_predicted"] = _gib(record["memory_predicted"])
            record["trained_weights"] = sum(record["trained_weights"].values())
        if event == "memory":
            record |= {name: _gib(record[name]) for name in ("measured", "predicted")}
        if event == "memory_is_short":
            record |= {name: _gib(record[name]) for name in ("needed", "free")}
        if event in _SAYS:
            self._stop_bar()
            self.console.print(_SAYS[event].format(**record), markup=False)
        if event == "resumed":
            for setting, change in record["changed"].items():
                self.console.print(f"  with {setting}: {change}", markup=False)
        if event == "start":
            for line in _machines(record["workers"]):
                self.console.print(line, markup=False)
            self.console.print(f"teacher: {record['teacher']}; logits: {record['logits']}", markup=False)
        if event == "start" and record["zero_stage"] == 3:
            chosen = record["deepspeed"]
            ahead, reuse = chosen["stage3_prefetch_bucket_size"], chosen["stage3_max_reuse_distance"]
            passes = "forward and backward together" if reuse > ahead else "forward, and again for backward"
            says = f"ZeRO-3 gathers {ahead:,} elements ahead: one block, in words; for {passes}"
            self.console.print(says, markup=False)

    def _show_step(self, record: dict) -> None:
        status = (
            f"loss {record['loss']:.4g}  {record['tokens_per_s']:,.0f} tokens/s  flips {record['flip_rate']:.1e}"
            + ("  skipped: not finite" if record["skipped"] else "")
        )
        if not self.console.is_terminal:
            every = max(1, self._steps // _PLAIN_LINES)
            if record["step"] % every == 0 or record["step"] in (1, self._steps):
                left = (self._steps - record["step"]) * record["seconds"]
                line = f"step {record['step']}/{self._steps}  {status}  about {left:.0f} s left"
                self.console.print(line, markup=False)
            return
        if self._progress is None:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(TextColumn("training"), *columns, console=self.console)
            self._progress.start()
            self._task = self._progress.add_task("training", total=self._steps, status="")
        self._progress.update(self._task, completed=record["step"], status=status)

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _machines(workers: list[dict]) -> Iterator[str]:
    """A line a host: which workers it has, on what."""
    by_host: dict[str, list[int]] = {}
    for rank, worker in enumerate(workers):
        by_host.setdefault(worker["host"], []).append(rank)
    for host, ranks in by_host.items():
        devices = sorted({workers[rank]["device"] for rank in ranks})
        yield f"  {host}: worker {', '.join(map(str, ranks))} on {', '.join(devices)}"

"""What the benchmarks share: a process of its own for every measurement, so that peak memory and thread settings are
its own, and a trainer on one rank."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from mbdist.config import RunConfig
from mbdist.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

    from mbdist.optim import OptimizerOfBits
    from mbdist.train.metrics import MetricsWriter
    from mbdist.train.trainer import Trainer

START = multiprocessing.get_context("spawn")


def in_own_process(measure: Callable[..., dict], config: RunConfig, *arguments) -> dict:
    """``measure(config, *arguments)`` plus ``peak_rss`` in bytes (on a GPU: its peak allocation)."""
    receive, send = START.Pipe(duplex=False)
    process = START.Process(target=_report, args=(measure, config, arguments, send))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        raise RunError(f"{measure.__name__} failed; its output is above") from None
    finally:
        process.join()
    if isinstance(result, UserError):
        raise result
    return result


def _report(measure: Callable[..., dict], config: RunConfig, arguments: tuple, send) -> None:
    from mbdist.train.environment import pin_accelerator

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pin_accelerator(config)
        result = measure(config, *arguments)
    except UserError as error:
        send.send(error)
        return
    import torch

    result["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        result["peak_rss"] = torch.cuda.max_memory_allocated()  # the memory that matters there
    send.send(result)


def _end_with_parent() -> None:
    """A bench that is killed, however, must not leave this process behind to keep the machine busy."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def seconds_of(step: Callable[[int], object], numbers: range) -> list[float]:
    """What each of the numbered steps takes."""
    seconds = []
    for number in numbers:
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    return seconds


def prepare_alone(config: RunConfig, optimizer: OptimizerOfBits) -> tuple[torch.device, MetricsWriter]:
    """Make this process the only rank, and convert unless that is done already."""
    from mbdist.train.environment import set_up_worker
    from mbdist.train.metrics import MetricsWriter
    from mbdist.train.prepare import prepare

    device = set_up_worker(config)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    metrics = MetricsWriter(Path(config.run_dir) / "metrics.jsonl")
    prepare(config, metrics, optimizer)
    return device, metrics


def one_process_trainer(config: RunConfig, optimizer: OptimizerOfBits | None = None) -> Trainer:
    """Convert unless that is done already, and set up everything that a step needs, on one rank. An ``optimizer`` of
    bits other than ours serves the conversion too."""
    from mbdist.comm.communicator import Communicator
    from mbdist.optim import BooleanOptimizer
    from mbdist.train.trainer import Trainer

    optimizer = optimizer or BooleanOptimizer
    device, metrics = prepare_alone(config, optimizer)
    return Trainer(config, device, Communicator(config.comm.timeout_s), metrics, optimizer)

"""Runs a measurement in a process of its own, so that peak memory and thread settings are its own."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

from mbdist.config import RunConfig
from mbdist.errors import RunError, UserError


def in_own_process(measure: Callable[..., dict], config: RunConfig, *arguments) -> dict:
    """``measure(config, *arguments)`` plus ``peak_rss`` in bytes (on a GPU: its peak allocation)."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(measure, config, arguments, send))
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

"""The jobs of a conversion as Ray tasks, on this machine or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mbdist.convert.initialize import Spread

_KEPT_APART = 1 << 16  # bytes: larger tensors go to the object store once, however many jobs take them


@contextmanager
def spread_over(workers: int) -> Iterator[Spread]:
    """A ``Spread`` that has ``workers`` jobs done at a time, each on one core. The bits are those of one process."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    try:
        task = ray.remote(num_cpus=1)(_on_one_core)

        def spread(function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
            stored: dict[int, tuple[Any, Any]] = {}  # by id: the argument (so that its id stays its own), reference

            def placed(argument: Any) -> Any:
                if not _is_large(argument):
                    return argument
                if id(argument) not in stored:
                    stored[id(argument)] = argument, ray.put(argument)
                return stored[id(argument)][1]

            pending: deque = deque()
            for job in jobs:
                if len(pending) == workers:
                    yield ray.get(pending.popleft())
                pending.append(task.remote(function, *map(placed, job)))
            while pending:
                yield ray.get(pending.popleft())

        yield spread
    finally:
        ray.shutdown()


def _on_one_core(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    return function(*map(_copied, arguments))


def _copied(argument: Any) -> Any:
    """At an address of torch's own choosing, as in one process: sums of a BLAS depend on the alignment."""
    if isinstance(argument, torch.Tensor):
        return argument.clone()
    if dataclasses.is_dataclass(argument):
        return dataclasses.replace(argument, **{name: _copied(value) for name, value in vars(argument).items()})
    return argument


def _is_large(argument: Any) -> bool:
    tensors = [argument, *vars(argument).values()] if dataclasses.is_dataclass(argument) else [argument]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)) > _KEPT_APART

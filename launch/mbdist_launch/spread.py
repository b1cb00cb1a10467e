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
from mbdist.errors import UserError
from mbdist_launch.ray_here import QUIET, start_ray_here


@contextmanager
def spread_over(workers: int) -> Iterator[Spread]:
    """A ``Spread`` that has ``workers`` jobs done at a time, one core each: the same bits for any number of workers on
    machines of one kind. They are those of one process too, as far as its sums do not depend on its number of threads
    (tests hold it for layers of the size of small models). Raises UserError where RAY_ADDRESS cannot be reached."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**QUIET)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
    else:
        start_ray_here(num_cpus=workers)
    try:
        task = ray.remote(num_cpus=1)(_on_one_core)

        def spread(function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
            stored: dict[int, tuple[Any, Any]] = {}  # by id: the argument (so that its id stays its own), reference

            def placed(argument: Any) -> Any:
                """What several jobs share goes to the object store once; rows of a matrix are one job's own."""
                if not dataclasses.is_dataclass(argument):
                    return _copied(argument)  # of a view, Ray would send all that it is a view of
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
    return _copied(function(*map(_copied, arguments)))  # of a view, Ray would send all that it is a view of


def _copied(argument: Any) -> Any:
    """At an address of torch's own choosing, as in one process: sums of a BLAS depend on the alignment."""
    if isinstance(argument, torch.Tensor):
        return argument.clone()
    if dataclasses.is_dataclass(argument):
        return dataclasses.replace(argument, **{name: _copied(value) for name, value in vars(argument).items()})
    return argument

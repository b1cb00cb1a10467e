"""The teacher of a run: a model resident on every worker, float or packed in K planes, or partitioned over the workers
by ZeRO-3, or none in memory at all but a cache on disk (``teacher_cache``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import datasets
import torch
from torch import nn

from mbdist.config.model import ModelConfig
from mbdist.config.schema import RunConfig
from mbdist.data import Batch
from mbdist.errors import UserError
from mbdist.loss import Lesson, Taught
from mbdist.model.loading import load_model
from mbdist.model.readout import Head, Read, Readout, target_rows
from mbdist.train.prepare import teacher_source
from mbdist.train.teacher_cache import CachedTeacher


class LiveTeacher:
    """A model in memory. Its logits are computed when they are asked for, a few tokens at a time."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,  # to compute in
        forward: Callable | None = None,  # of the engine around the model, where there is one
        gathered: Callable[[nn.Module], contextlib.AbstractContextManager] = lambda _module: contextlib.nullcontext(),
        placement: str = "resident",
    ):
        self.model = model
        self.placement = placement
        self._device, self._dtype = device, dtype
        self._forward = forward or model
        self._gathered = gathered
        self._readout = Readout(model)

    @torch.no_grad()
    def teach(self, batch: Batch, hidden: bool = False) -> Lesson:
        """What it says about a micro-batch; ``hidden``: with the states after every block. All ranks call it."""
        heads = []

        def keep(states: torch.Tensor, head: Head) -> torch.Tensor:
            heads.append(head)
            return states

        with self._autocast():
            output, states = self._readout(
                self._forward, keep, batch.input_ids, use_cache=False, output_hidden_states=hidden
            )
        return _LiveLesson(states, heads[0], self._head_whole, output.hidden_states[1:] if hidden else None)

    def _head_whole(self) -> contextlib.AbstractContextManager:
        """While it is open, the head's weight can be multiplied with."""
        return self._gathered(self._readout.head_module) if self._readout.cut else contextlib.nullcontext()

    def read(self, input_ids: torch.Tensor, read: Read) -> torch.Tensor:
        """The teacher as a ``Reader``, to be evaluated itself."""
        with self._autocast():
            return self._readout(self._forward, read, input_ids, use_cache=False)[1]

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def parameters(self) -> Iterator[torch.Tensor]:
        return self.model.parameters()

    def describe(self) -> str:
        return f"{self.placement}, its logits {self._readout.describe()}"

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


class _LiveLesson:
    def __init__(self, states, head: Head, gathered: Callable, hidden_states):
        self.states, self.head, self.gathered, self.hidden_states = states, head, gathered, hidden_states

    @contextlib.contextmanager
    def opened(self, is_target: torch.Tensor) -> Iterator[Taught]:
        with self.gathered():
            yield _LiveLogits(target_rows(self.states, is_target), self.head)


class _LiveLogits:
    def __init__(self, rows: torch.Tensor, head: Head):
        self.rows, self.head = rows, head

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.head.logits(self.rows[rows])


def load_teacher(
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    windows: datasets.Dataset,  # the run's training windows
    vocabulary: int,  # of the student
) -> LiveTeacher | CachedTeacher | None:
    """The teacher that ``config.loss`` names. Raises UserError for one that does not fit the run."""
    source = teacher_source(config)
    teacher: LiveTeacher | CachedTeacher
    if config.loss.teacher == "cached":
        teacher = CachedTeacher(config, windows, source, device)
    elif source is not None:
        teacher = live_teacher(source, config.loss.teacher_placement, device, dtype)
    else:
        return None
    if teacher.vocabulary != vocabulary:
        raise UserError(
            f"the teacher ({teacher.describe()}) has a vocabulary of {teacher.vocabulary:,} tokens, the student one of "
            f"{vocabulary:,}: KL needs the same one"
        )
    return teacher


def live_teacher(source: ModelConfig, placement: str, device: torch.device, dtype: torch.dtype) -> LiveTeacher:
    """``source`` in memory, ``resident`` or ``sharded``."""
    if placement == "resident":
        return LiveTeacher(load_model(source, dtype).to(device).requires_grad_(False), device, dtype)
    from mbdist.engine.frozen import PartitionedModel

    model = PartitionedModel(source, dtype, device)
    return LiveTeacher(model.module, device, dtype, model.forward, model.gathered, "sharded by ZeRO-3")

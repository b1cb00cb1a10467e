"""Planes under ZeRO-3: every rank holds its flat part of every plane, and the owner of the part owns its flips."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import deepspeed
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import ReplicatedPlanes
from mbdist.comm.partition import WordPartition
from mbdist.engine.deepspeed_config import SMALL_FLOATS
from mbdist_kernels import xor_apply


def keep_resident(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Turn parameters into buffers of the same names, which ZeRO neither partitions nor gathers. (What DeepSpeed calls
    persistent is released and gathered again in every step.)"""
    buffers = {id(parameter): parameter.data for parameter in parameters}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in buffers:
                delattr(module, name)
                module.register_buffer(name, buffers[id(parameter)])


def gather_by_blocks(model: nn.Module) -> None:
    """Let ZeRO gather, and reduce, what a numbered block has together: the messages of single packed layers are small
    and many. The first block stays as it is: where its inputs want no gradient, DeepSpeed would reduce the gradients of
    a whole block before they are there."""
    for name, module in model.named_modules():
        if re.fullmatch(r"\D*\.\d+", name) and not name.endswith(".0"):
            set_z3_leaf_module(module, True)


def forget_forward_pass(engine: deepspeed.DeepSpeedEngine) -> None:
    """To be called before a forward pass if the one before it had no backward pass. From the first pass that it records
    DeepSpeed learns when parameters are used again, and it caches what to release: if that was an evaluation, training
    would for ever release in forward what backward uses."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if coordinator.is_record_trace():
        coordinator._invalidate_trace()


def ask_no_other_ranks() -> None:
    """For fake ranks, in the whole process: DeepSpeed does not compare its order of modules with theirs."""
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _ints: None


def keep_between_steps(engine: deepspeed.DeepSpeedEngine) -> list[nn.Parameter]:
    """Let small trained floats, scales above all, stay whole from one step to the next; they are returned. (DeepSpeed
    calls that persistent.) Planes must not be: a gathered copy would not see the flips in its partitions."""
    kept = [p for p in engine.module.parameters() if p.requires_grad and p.ds_numel <= SMALL_FLOATS]
    for parameter in kept:
        parameter.ds_persist = True
    return kept


def gather_after_step(kept: list[nn.Parameter]) -> None:
    """Gather in one message what the optimizer has changed; DeepSpeed would send one a parameter."""
    changed = [p for p in kept if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if changed:
        changed[0].all_gather_coalesced(changed).wait()


def _is_partitioned(plane: torch.Tensor) -> bool:
    return hasattr(plane, "ds_tensor")


class PartitionedPlanes:
    """A ``PlaneStore`` over DeepSpeed's partitions. The next gather distributes the flips: they cost no message, but
    for planes that stay resident, which are flipped like those of ``ReplicatedPlanes``."""

    def __init__(
        self,
        planes: Sequence[Sequence[torch.Tensor]],
        partitions: Sequence[WordPartition],
        communicator: Communicator,
        bucket_bytes: int,
    ):
        for of_matrix, partition in zip(planes, partitions, strict=True):
            for plane in filter(_is_partitioned, of_matrix):
                if plane.ds_tensor.numel() != partition.words_per_rank:
                    raise RuntimeError(
                        f"DeepSpeed cut a plane of {partition.num_words} words into parts of "
                        f"{plane.ds_tensor.numel()}, not {partition.words_per_rank}: this DeepSpeed version partitions "
                        "differently"
                    )
        self.planes = planes
        self._resident = ReplicatedPlanes(planes, partitions, communicator, bucket_bytes)

    def owned_words(self, matrix: int, k: int) -> torch.Tensor:
        plane = self.planes[matrix][k]
        return plane.ds_tensor.data if _is_partitioned(plane) else self._resident.owned_words(matrix, k)

    def apply(self, masks: dict[tuple[int, int], torch.Tensor]) -> None:
        partitioned = {key: mask for key, mask in masks.items() if _is_partitioned(self.planes[key[0]][key[1]])}
        resident = {key: mask for key, mask in masks.items() if key not in partitioned}
        if any(self.planes[m][k].ds_status != ZeroParamStatus.NOT_AVAILABLE for m, k in partitioned):
            raise RuntimeError("a plane is still gathered from a forward pass: flips would not reach that copy")
        for (matrix, k), mask in partitioned.items():
            xor_apply(self.planes[matrix][k].ds_tensor.data, mask)
        if resident:
            self._resident.apply(resident)

    def check_replicas(self, names: Sequence[str]) -> str | None:
        """Of the resident planes; of the others there is one copy of every word."""
        of_all = [plane for of_matrix in self.planes for plane in of_matrix]
        resident = {name: plane for name, plane in zip(names, of_all, strict=True) if not _is_partitioned(plane)}
        return self._resident.check(list(resident.values()), list(resident))

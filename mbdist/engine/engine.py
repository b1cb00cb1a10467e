"""What the trainer asks of DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import deepspeed
import torch
from torch import nn

from mbdist.checkpoint import Checkpoint, Piece
from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import PlaneStore, ReplicatedPlanes
from mbdist.config.schema import RunConfig
from mbdist.engine.deepspeed_config import deepspeed_config
from mbdist.engine.float_optimizer import SkippableAdamW, optimizer_bytes
from mbdist.engine.kept_floats import kept_parts, make_moments, optimizer_steps
from mbdist.engine.traffic import count_traffic
from mbdist.engine.zero3 import (
    PartitionedPlanes,
    forget_forward_pass,
    gather_after_step,
    gather_by_blocks,
    keep_between_steps,
)
from mbdist.optim.boolean import BooleanOptimizer
from mbdist.optim.parameter_groups import parameter_groups
from mbdist.optim.schedule import warmup_cosine

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class Engine:
    """A student under ZeRO: forward, backward, the float step, and a full state dict for saving."""

    def __init__(
        self,
        student: nn.Module,  # as ``place`` left it
        boolean: BooleanOptimizer,
        config: RunConfig,
        communicator: Communicator,
        magnitudes: Mapping[str, float],  # of the trained floats, as the run started
    ):
        self.zero_stage = config.cluster.zero_stage
        self.communicator = communicator
        self._comm = config.comm
        self._went_back = False  # since the last forward pass
        if self.zero_stage == 3:
            gather_by_blocks(student)
        trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
        self._floats = floats = config.floats
        self.optimizer = SkippableAdamW(
            parameter_groups(trained, floats, magnitudes),
            lr=floats.lr,
            betas=floats.betas,
            weight_decay=floats.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, config.train.steps, floats.warmup_fraction)
        )
        settings = deepspeed_config(config, list(student.named_parameters()))
        self.engine, *_ = deepspeed.initialize(
            model=student, optimizer=self.optimizer, lr_scheduler=self._schedule, config=settings
        )
        count_traffic(communicator)
        self._kept = keep_between_steps(self.engine) if self.zero_stage == 3 else []
        self.zero_settings = settings["zero_optimization"]
        boolean.store = self._plane_store(boolean)

    def _plane_store(self, boolean: BooleanOptimizer) -> PlaneStore:
        planes = [layer.planes for layer in boolean.layers.values()]
        if self.zero_stage < 3:
            return ReplicatedPlanes(planes, boolean.partitions, self.communicator, self._comm.bucket_bytes)
        return PartitionedPlanes(planes, boolean.partitions, self.communicator, self._comm.bucket_bytes)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def learning_rate(self) -> float:
        """``floats.lr`` as the schedule has it."""
        return self._schedule.lr_lambdas[0](self._schedule.last_epoch) * self._floats.lr

    @property
    def gradient_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def forward(self, **inputs):
        if self.zero_stage == 3 and not self._went_back:
            forget_forward_pass(self.engine)
        self._went_back = False
        return self.engine(**inputs)

    def end_evaluation(self) -> None:
        """Give back what stage 3 has gathered, or is gathering, for a backward pass that does not come. Parameters on
        their way could not be saved."""
        if self.zero_stage == 3:
            self.engine.empty_partition_cache()
            gather_after_step(self._kept)

    def backward(self, loss: torch.Tensor) -> None:
        """``loss`` is this rank's share times ranks times accumulation steps: DeepSpeed takes means over both."""
        self.engine.backward(loss)
        self._went_back = True

    def step(self, apply: bool = True) -> None:
        """To be called after every backward; at an accumulation boundary it updates the floats, if ``apply``."""
        self.optimizer.skip = not apply
        self.engine.step()
        gather_after_step(self._kept)

    def float_state_bytes(self) -> int:
        """Bytes of the trained floats, masters and moments that this rank keeps between steps."""
        trained = (p for p in self.engine.module.parameters() if p.requires_grad)
        return optimizer_bytes(self.optimizer, trained)

    def _saved_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers that a saved model has, by name, in the order of names."""
        module = self.engine.module
        persistent = module.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)
        return dict(sorted([*module.named_parameters(), *buffers]))

    def full_layout(self) -> dict[str, torch.Tensor]:
        """What ``full_state`` will yield, on the meta device."""
        return {
            name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
            for name, tensor in self._saved_tensors().items()
        }

    def full_state(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter and buffer by name, in the order of names, whole, on the CPU of rank 0 (None on the others),
        gathered as it is yielded. All ranks iterate."""
        for name, tensor in self._saved_tensors().items():
            self.communicator.activity.enter(f"saving {name}")
            gathered = deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_tensor"))
            with gathered:
                whole = tensor.detach().to("cpu", copy=True) if self.communicator.rank == 0 else None
            yield name, whole

    def state_pieces(self) -> Iterator[Piece]:
        """This rank's share of the trained floats and their moments."""
        rank, ranks = self.communicator.rank, self.communicator.world_size
        for name, part in kept_parts(self.engine, self.optimizer, rank).items():
            first, end = 0, part.value.numel()
            if self.zero_stage == 0:  # every rank keeps all
                first, end = end * rank // ranks, end * (rank + 1) // ranks
            for key, values in {"value": part.value, **part.moments}.items():
                yield Piece(f"float/{name}/{key}", part.first + first, values[first:end])

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has taken."""
        return optimizer_steps(self.optimizer)

    def shared_state(self) -> dict:
        """What all ranks have alike, as JSON."""
        return {"schedule": self._schedule.last_epoch, "optimizer_steps": self.optimizer_steps}

    def load_state(self, shared: dict, saved: Checkpoint) -> None:
        """Restore the schedule and the moments; the floats themselves the model has by now."""
        self._schedule.last_epoch = shared["schedule"]
        factor = self._schedule.lr_lambdas[0](self._schedule.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = base * factor
        self._schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if shared["optimizer_steps"]:
            make_moments(self.engine, self.optimizer, shared["optimizer_steps"])
            for name, part in kept_parts(self.engine, self.optimizer, self.communicator.rank).items():
                for key, values in part.moments.items():
                    values.copy_(saved.read(f"float/{name}/{key}", part.first, values.numel()))

    def close(self) -> None:
        self.engine.destroy()

"""The baseline of the benchmarks: dense bf16 weights under DeepSpeed with fp32 masters and AdamW."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from torch import nn

from mbdist.config.schema import RunConfig
from mbdist.engine.deepspeed_config import deepspeed_config
from mbdist.engine.float_optimizer import optimizer_bytes
from mbdist.engine.zero3 import keep_resident


def made_partitioned(make: Callable[[], nn.Module], config: RunConfig) -> nn.Module:
    """The model that ``make`` makes, in bf16, every parameter cut over the ranks by ZeRO-3 as soon as it is there."""
    settings = deepspeed_config(config)
    settings["bf16"] = {"enabled": True}
    deepspeed.init_distributed()  # takes over the group that is there
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        return make()


class DenseEngine:
    """DeepSpeed's own bf16 training of the parameters that require gradients."""

    def __init__(self, student: nn.Module, config: RunConfig):
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        floats = config.floats
        self.optimizer = torch.optim.AdamW(
            trained, lr=floats.lr, betas=floats.betas, weight_decay=floats.weight_decay, fused=True
        )
        settings = deepspeed_config(config)
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "bf16"
        settings["zero_optimization"]["stage"] = max(1, config.cluster.zero_stage)  # bf16 masters need ZeRO
        if config.cluster.zero_stage == 3 and config.comm.resident_floats == "frozen":
            student.bfloat16()  # DeepSpeed casts parameters, not the buffers that these become
            keep_resident(student, (p for p in student.parameters() if not p.requires_grad))
        self.engine, *_ = deepspeed.initialize(model=student, optimizer=self.optimizer, config=settings)

    def forward(self, **inputs):
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def state_bytes(self) -> int:
        """bf16 weights and gradients, fp32 masters and moments of what is trained."""
        trained = (p for p in self.engine.module.parameters() if p.requires_grad)
        return optimizer_bytes(self.optimizer, trained, copies=2)

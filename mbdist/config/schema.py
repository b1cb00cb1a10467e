"""Every setting of a run, documented where it is declared; ``mbdist config schema`` prints it as JSON schema."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from mbdist.config.checkpoint import CheckpointConfig
from mbdist.config.cluster import LAUNCHERS_OWN, ClusterConfig
from mbdist.config.comm import CommConfig
from mbdist.config.convert import ConvertConfig
from mbdist.config.data import DataConfig
from mbdist.config.loss import LossConfig
from mbdist.config.model import ModelConfig
from mbdist.config.optimizers import BooleanOptimizerConfig, FloatOptimizerConfig
from mbdist.config.section import Section
from mbdist.config.train import TrainConfig


class RunConfig(Section):
    """One run, wherever it runs."""

    run_dir: str
    """Folder of the run: resolved config, converted model, metrics, logs, the finished model, summary."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the data order and of stochastic rounding."""
    model: ModelConfig
    """What to start from."""
    convert: ConvertConfig = ConvertConfig()
    """How the float model becomes multi-Boolean."""
    data: DataConfig
    """Training and evaluation text."""
    train: TrainConfig = TrainConfig()
    """Length and batch of the run."""
    boolean: BooleanOptimizerConfig = BooleanOptimizerConfig()
    """The optimizer of the bits."""
    floats: FloatOptimizerConfig = FloatOptimizerConfig()
    """The optimizer of the scales."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    comm: CommConfig = CommConfig()
    """Communication of the Boolean signal."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and sharding."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming the state of a run."""
    sample_prompt: str | None = "The"
    """Text that the finished model continues, as a sign of life in the summary; null for none."""

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker adds up before a step."""
        return self.train.sequences_per_step // (self.cluster.most_workers * self.train.micro_batch)

    def at_size(self, workers: int) -> RunConfig:
        """The config of a run that has so many workers now."""
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"workers": workers})})

    @property
    def offloads(self) -> list[str]:
        """Settings that keep something in host memory, those that are on."""
        chosen = {
            "boolean.offload_accumulators": self.boolean.offload_accumulators,
            "train.offload_activations": self.train.offload_activations,
        }
        return [setting for setting, on in chosen.items() if on]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step's global batch."""
        return self.train.sequences_per_step * self.data.window

    @model_validator(mode="after")
    def _settings_fit_together(self) -> RunConfig:
        problems = []
        sizes = range(self.cluster.fewest_workers, self.cluster.most_workers + 1)
        if not sizes:
            problems.append(f"cluster.workers: min = {sizes.start} is more than max = {sizes.stop - 1}")
        if misfits := [
            workers for workers in sizes if self.train.sequences_per_step % (workers * self.train.micro_batch)
        ]:
            problems.append(self._explain_batch(misfits, sizes))
        if owned := sorted(LAUNCHERS_OWN.intersection(self.cluster.environment)):
            problems.append(f"cluster.environment: {', '.join(owned)} is set by the launcher: leave it out")
        planes = self.boolean.planes
        if isinstance(planes, list) and len(set(planes)) < len(planes):
            problems.append(f"boolean.planes = {planes} names a plane twice")
        nodes = self.comm.node_size
        if isinstance(nodes, int) and (uneven := [workers for workers in sizes if workers % min(nodes, workers)]):
            problems.append(
                f"cluster.workers = {uneven[0]} cannot be cut into machines of {self.comm.node_size} workers "
                "(comm.node_size): set it to the number of workers on each machine, or to null"
            )
        for setting in ("resident_planes", "resident_floats"):
            if getattr(self.comm, setting) != "none" and self.cluster.zero_stage < 3:
                problems.append(
                    f"comm.{setting} is for cluster.zero_stage = 3: at stage {self.cluster.zero_stage} every worker "
                    f"holds everything anyway; set it to none"
                )
        if self.checkpoint.keep_best and not self.train.eval_every:
            problems.append("checkpoint.keep_best needs evaluations to choose by: set train.eval_every")
        if self.boolean.signal == "evidence" and self.boolean.accumulator == "int4":
            problems.append(
                "boolean.accumulator = int4 has a unit of about a standard error, too coarse for boolean.signal = "
                "evidence: use int8, or boolean.signal=curvature with boolean.step_size=0.05"
            )
        if self.boolean.turns > 1 and self.boolean.planes == "alternating":
            problems.append(
                f"boolean.turns = {self.boolean.turns}: with boolean.planes = alternating planes take turns; set "
                "boolean.turns to 1, or boolean.planes to last"
            )
        for setting in self.offloads if self.cluster.device == "cpu" else []:
            problems.append(f"{setting} is for GPU workers, and cluster.device = cpu: set it to false")
        if self.train.offload_activations and not self.train.activation_checkpointing:
            problems.append("train.offload_activations needs train.activation_checkpointing: set that to true too")
        if self.loss.teacher == "none" and self.loss.hidden != "none":
            problems.append(f"loss.hidden = {self.loss.hidden} needs a teacher: set loss.teacher to float")
        idle = self.loss.kl_weight == 0 == self.loss.cross_entropy_weight and self.loss.hidden == "none"
        if self.loss.teacher == "cached" and self.loss.hidden != "none":
            problems.append(
                f"loss.hidden = {self.loss.hidden} needs the teacher's hidden states, which a cache does not have: set "
                "loss.hidden to none, or loss.teacher to float"
            )
        if self.loss.teacher == "cached" and self.loss.top_k is not None:
            problems.append("loss.top_k is for a live teacher: with loss.teacher = cached set loss.cache.top_k instead")
        if self.loss.teacher != "none" and idle:
            problems.append("loss: every weight is 0: give loss.kl_weight or loss.cross_entropy_weight a value")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _explain_batch(self, misfits: list[int], sizes: range) -> str:
        batch, micro, workers = self.train.sequences_per_step, self.train.micro_batch, misfits[0]
        wrong = (
            f"train.sequences_per_step = {batch} cannot be cut into whole micro-batches of {micro} "
            f"(train.micro_batch) on {workers} workers (cluster.workers): "
        )
        if len(sizes) > 1:
            return f"{wrong}it must be a multiple of {micro * math.lcm(*sizes)} for {sizes[0]} to {sizes[-1]} workers"
        if workers > batch:
            return f"{wrong}use at most {batch} workers, or at least {workers} sequences a step"
        fits = [m for m in range(1, batch // workers + 1) if batch % (workers * m) == 0]
        if fits:
            return f"{wrong}train.micro_batch can be {', '.join(map(str, fits))} here"
        return f"{wrong}train.sequences_per_step must be a multiple of {workers}"

"""Finetunes a multi-Boolean model: student, teacher, data and both optimizers of one worker."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import socket
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from transformers import PreTrainedModel

from mbdist.checkpoint import Checkpoint, CheckpointWriter, check_resumable
from mbdist.comm.agreement import agree, share_launch_settings
from mbdist.comm.communicator import Communicator
from mbdist.config.schema import RunConfig
from mbdist.data import Batch, Batches, load_corpus
from mbdist.engine import Engine
from mbdist.errors import Interrupted, UserError
from mbdist.model.hashing import hash_tensors
from mbdist.model.layers import bits_per_weight, boolean_layers, is_scale
from mbdist.model.loading import load_model, load_tokenizer
from mbdist.model.saving import save_model
from mbdist.optim import BooleanOptimizer, FlipReport, OptimizerOfBits
from mbdist.train.environment import compute_dtype, node_size
from mbdist.train.evaluate import evaluate
from mbdist.train.loss import LossTerms, distillation_loss
from mbdist.train.metrics import MetricsWriter
from mbdist.train.prepare import preparation_key, student_source, teacher_source
from mbdist.train.run_folder import checkpoint_folder
from mbdist.train.stop_signals import StopRequest
from mbdist_kernels import fold_key

_SAME_VERSIONS = ("mbdist", "torch", "deepspeed", "transformers")


def choose_trained_floats(model: PreTrainedModel, patterns: list[str], dtype: torch.dtype) -> None:
    """Scales, and float parameters that match a pattern, are trained in fp32; all others are frozen in ``dtype``.

    Raises UserError for a pattern that matches nothing.
    """
    unused = set(patterns)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
        unused -= matching
        parameter.requires_grad = bool(matching) or is_scale(name)
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    if unused:
        names = ", ".join(
            name for name, p in model.named_parameters() if p.is_floating_point() and "scale_" not in name
        )
        raise UserError(f"floats.also_train: no parameter matches {', '.join(sorted(unused))}; there are {names[:400]}")


@torch.no_grad()
def load_parameters(saved: Checkpoint, student: PreTrainedModel) -> None:
    """The planes and trained floats of a checkpoint, into a student that is not sharded yet."""
    for name, parameter in student.named_parameters():
        key = f"plane/{name}" if parameter.dtype == torch.int32 else f"float/{name}/value"
        if key in saved:
            parameter.copy_(saved.whole(key, parameter))
        elif parameter.requires_grad:
            raise UserError(f"{saved.folder} does not have {name}, which trains in this run")


class Trainer:
    """One worker's part of the training; all workers call its methods together."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        communicator: Communicator,
        metrics: MetricsWriter,
        optimizer: OptimizerOfBits = BooleanOptimizer,
        saved: Checkpoint | None = None,  # to go on from
        stopping: StopRequest | None = None,  # None: nobody will ask
    ):
        self.config = config
        self.device = device
        self.communicator = communicator
        self.metrics = metrics
        self.dtype = compute_dtype(config.train.precision, device)
        source = student_source(config)
        self.tokenizer = load_tokenizer(source)
        self.corpus = load_corpus(config.data, self.tokenizer)
        self.batches = Batches(
            self.corpus.train,
            config.seed,
            config.train.sequences_per_step,
            config.train.micro_batch,
            communicator.rank,
            communicator.world_size,
        )
        student = load_model(source)
        self._agree(student)
        share_launch_settings(communicator)
        self.bits_per_weight = bits_per_weight(student)
        self.num_planes = max(layer.num_planes for _, layer in boolean_layers(student))
        choose_trained_floats(student, config.floats.also_train, self.dtype)
        if saved is not None:
            changed = check_resumable(saved, config, preparation_key(config))
            load_parameters(saved, student)
        student.to(device)
        if config.train.activation_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        self.teacher = self._load_teacher()
        self.boolean = optimizer(
            dict(boolean_layers(student)),
            config.boolean,
            config.comm.model_copy(update={"node_size": node_size(config.comm)}),
            communicator,
            total_steps=config.train.steps,
            micro_batches=config.accumulation,
            seed=config.seed,
            gradient_scale=communicator.world_size,
        )
        self.engine = Engine(student, self.boolean, config, communicator)
        self.stopping = stopping
        self.first_step = self.steps_done = self._saved_step = 0
        attempt = communicator.all_gather_objects(uuid.uuid4().hex[:8], "agreement")[0]
        self.writer = CheckpointWriter(
            checkpoint_folder(config),
            config.checkpoint,
            communicator.rank,
            communicator.world_size,
            attempt,
            metrics.write,
        )
        self._say_what_was_decided()
        if saved is not None:
            self.boolean.load_state(saved.state["boolean"], saved)
            self.engine.load_state(saved.state["engine"], saved)
            self.first_step = self.steps_done = self._saved_step = saved.step
            metrics.write("resumed", step=saved.step, folder=str(saved.folder), changed=changed)

    def _agree(self, student: PreTrainedModel) -> None:
        """Stop here, and not in a collective that never ends, where workers would compute different things."""
        if self.communicator.world_size == 1:
            return  # the digest of a large model takes its time
        of_this_worker = {"run_dir": True, "cluster": {"device", "cpus_per_worker"}, "data": {"cache_dir"}}
        sections = self.config.model_dump(mode="json", exclude=of_this_worker)
        facts = {f"the version of {name}": importlib.metadata.version(name) for name in _SAME_VERSIONS}
        for section, value in sections.items():
            settings = value.items() if isinstance(value, dict) else [("", value)]
            facts |= {f"{section}.{key}".removesuffix("."): repr(setting) for key, setting in settings}
        facts["the compute type (train.precision)"] = str(self.dtype)
        facts["the kind of device (cluster.device)"] = self.device.type
        facts["the number of workers on a machine (comm.node_size)"] = str(node_size(self.config.comm))
        facts["the digest of the model's weights"] = hash_tensors(student.state_dict())
        agree(self.communicator, facts)

    def _load_teacher(self) -> PreTrainedModel | None:
        source = teacher_source(self.config)
        if source is None:
            return None
        return load_model(source, self.dtype).to(self.device).requires_grad_(False)

    def _say_what_was_decided(self) -> None:
        config = self.config
        here = {"host": socket.gethostname(), "pid": os.getpid(), "device": _device_name(self.device)}
        workers = self.communicator.all_gather_objects(here, "agreement")
        self.metrics.write(
            "start",
            workers=workers,
            versions={name: importlib.metadata.version(name) for name in _SAME_VERSIONS},
            model=config.model.path,
            steps=config.train.steps,
            world_size=self.communicator.world_size,
            zero_stage=config.cluster.zero_stage,
            device=str(self.device),
            precision=str(self.dtype).removeprefix("torch."),
            micro_batch=config.train.micro_batch,
            accumulation=config.accumulation,
            codec=config.comm.codec,
            deepspeed=self.engine.zero_settings,
            planes=self.num_planes,
            bits_per_weight=self.bits_per_weight,
            trained_weights={entry.name: entry.layer.num_weights for entry in self.boolean.accumulated},
        )

    # Forward passes.

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _student(self, input_ids: torch.Tensor, hidden: bool = False):
        with self._autocast():
            return self.engine.forward(input_ids=input_ids, use_cache=False, output_hidden_states=hidden)

    @torch.no_grad()
    def _teach(self, input_ids: torch.Tensor, hidden: bool = False):
        with self._autocast():
            return self.teacher(input_ids=input_ids, use_cache=False, output_hidden_states=hidden)

    def evaluate(self, name: str) -> float | None:
        """Measure, log and return held-out perplexity of the student, or of the teacher under the name ``float``; None
        where there is no teacher."""
        if name == "float" and self.teacher is None:
            return None
        forward = self._teach if name == "float" else self._student
        self.engine.module.eval()
        started = time.perf_counter()
        found = evaluate(
            lambda ids: forward(ids).logits,
            self.corpus.eval,
            self.config.train.eval_batch,
            self.communicator,
            self.device,
            between=self._between_batches,
        )
        self.engine.module.train()
        seconds = round(time.perf_counter() - started, 2)
        self.metrics.write("eval", name=name, step=self.steps_done, perplexity=found.perplexity, seconds=seconds)
        return found.perplexity

    def _between_batches(self) -> None:
        self.communicator.activity.enter("evaluating")
        stop, _ = self._agreed(False)
        if stop:
            self._stop()

    # Training.

    def train(self) -> None:
        self.engine.module.train()
        skipped = 0
        for step in range(self.first_step, self.config.train.steps):
            started = time.perf_counter()
            stop, save = self._agreed(self.communicator.rank == 0 and self.writer.is_due(step))
            if stop:
                self._stop()
            if save and step > self.first_step:
                self.checkpoint()
            report, losses = self.step(step)
            self.steps_done = step + 1
            skipped = 0 if report else skipped + 1
            self._log_step(step, report, losses, time.perf_counter() - started)
            if skipped >= self.config.train.max_skipped_steps:
                raise UserError(
                    f"{skipped} steps in a row had a loss or a signal that is not finite; the run stops at step "
                    f"{step}. Lower floats.lr or boolean.max_flip_rate, or use train.precision=fp32"
                )
            every = self.config.train.check_planes_every
            if every and (step + 1) % every == 0:
                self._check_replicas(step)
            every = self.config.train.eval_every
            if every and (step + 1) % every == 0 and step + 1 < self.config.train.steps:
                perplexity = self.evaluate("in training")
                if self.config.checkpoint.keep_best:
                    self.checkpoint(perplexity)
        self.communicator.activity.enter("writing a checkpoint")
        self.writer.wait()

    def _agreed(self, save: bool) -> tuple[bool, bool]:
        """(whether a worker was told to stop, whether one wants to save): what all of them do now."""
        told = self.stopping is not None and self.stopping.seen
        wishes = torch.tensor([told, save], dtype=torch.int32, device=self.device)
        stop, save = self.communicator.all_reduce_sum(wishes, "statistics").tolist()
        return bool(stop), bool(save)

    def _stop(self) -> NoReturn:
        """Save what was not saved, and end the run here."""
        if self.steps_done > self.first_step:
            self.checkpoint()
        self.writer.wait()
        self.communicator.all_gather_objects(None, "agreement")  # launchers end all workers with the first that leaves
        raise Interrupted(self.steps_done)

    def checkpoint(self, perplexity: float | None = None) -> None:
        """Save the state after the steps that are done, with its held-out perplexity where that is known; all ranks
        call it together, between steps."""
        self.communicator.activity.enter("taking a snapshot")
        if self.steps_done == self._saved_step:
            return
        self._saved_step = self.steps_done
        state = {
            "step": self.steps_done,
            "perplexity": perplexity,
            "config": self.config.model_dump(mode="json"),
            "prepared": preparation_key(self.config),
            "boolean": self.boolean.shared_state(),
            "engine": self.engine.shared_state(),
        }
        pieces = [*self.boolean.state_pieces(), *self.engine.state_pieces()]
        self.writer.save(self.steps_done, pieces, state)

    def step(self, step: int) -> tuple[FlipReport | None, torch.Tensor]:
        """One optimizer step: (report, or None where it was skipped; mean loss, kl, cross-entropy, and targets)."""
        config, ranks, enter = self.config, self.communicator.world_size, self.communicator.activity.enter
        enter("reading data")
        micro_batches = [self.batches.micro_batch_at(step, a) for a in range(config.accumulation)]
        losses = torch.zeros(4, dtype=torch.float64, device=self.device)
        losses[3] = sum(int(batch.learned[:, 1:].sum()) for batch in micro_batches)
        targets = int(self.communicator.all_reduce_sum(losses[3:].clone(), "statistics"))
        report = None
        self.boolean.probing = config.train.probe_every > 0 and (step + 1) % config.train.probe_every == 0
        for a, batch in enumerate(micro_batches):
            enter("forward")
            terms = self._loss(batch, targets, step, a)
            enter("backward")
            losses[:3] += torch.tensor([terms.total.item(), terms.kl, terms.cross_entropy], device=self.device)
            # DeepSpeed averages over ranks and accumulation steps; the loss is a sum over the global batch.
            self.engine.backward(terms.total * (ranks * config.accumulation))
            self.boolean.finish_micro_batch()
            enter("flips")
            last = a + 1 == config.accumulation
            finite = not last or self.boolean.all_finite(losses[0])
            if last:
                report = self.boolean.step() if finite else self.boolean.skip()
                if report is not None and self.boolean.probing:
                    self._probe(step, micro_batches, targets, losses[0].clone(), report)
            self.learning_rate = self.engine.learning_rate  # of this step: the schedule advances in it
            enter("step of the floats")
            self.engine.step(apply=finite)
        self.communicator.all_reduce_sum(losses, "statistics")
        losses[1:3] /= max(1, targets)
        return report, losses

    @torch.no_grad()
    def _probe(self, step: int, batches: list[Batch], targets: int, before: torch.Tensor, report: FlipReport) -> None:
        """Measure the loss of the step's own batch again, after its flips and before the floats follow."""
        after = sum(self._loss(batch, targets, step, a).total.double() for a, batch in enumerate(batches))
        measured = self.communicator.all_reduce_sum(torch.stack([after - before]), "statistics").item()
        self.metrics.write(
            "probe",
            step=step + 1,
            predicted_change=sum(report.predicted.values()),
            measured_change=measured,
            flips=report.total(),
            predicted=report.predicted,
        )

    def _loss(self, batch: Batch, targets: int, step: int, accumulation: int) -> LossTerms:
        """Loss of one micro-batch as its share of the global batch, which has ``targets`` targets."""
        # Dropout, where a model has it, follows the data: the same masks for any number of workers.
        contribution = accumulation * self.communicator.world_size + self.communicator.rank
        torch.manual_seed(fold_key(self.config.seed, step, contribution))
        ids, learned = batch.input_ids.to(self.device), batch.learned.to(self.device)
        hidden = self.config.loss.hidden != "none"
        taught = self._teach(ids, hidden) if self.teacher is not None else None
        output = self._student(ids, hidden)
        return distillation_loss(
            output.logits,
            taught.logits if taught is not None else None,
            ids,
            learned,
            self.config.loss,
            targets,
            self.config.train.sequences_per_step,
            output.hidden_states[1:] if hidden else None,
            taught.hidden_states[1:] if hidden else None,
        )

    def _check_replicas(self, step: int) -> None:
        differs = self.boolean.store.check_replicas(self.boolean.plane_names)
        if differs is not None:
            raise RuntimeError(f"after step {step} the ranks hold different planes; the first that differs: {differs}")

    def _log_step(self, step: int, report: FlipReport | None, losses: torch.Tensor, seconds: float) -> None:
        loss, kl, cross_entropy, _ = losses.tolist()
        tokens = self.config.tokens_per_step
        sent, received = self.take_bytes()
        every = self.config.train.check_planes_every
        self.metrics.write(
            "step",
            step=step + 1,
            loss=loss,
            kl=kl if self.teacher is not None else None,
            cross_entropy=cross_entropy,
            skipped=report is None,
            flip_rate=report.total() / self.boolean.num_trained_weights if report else 0.0,
            flip_cap=report.cap_rate if report else 0.0,
            flips=report.flips if report else {},
            flipped_back=report.flipped_back if report else {},
            flip_candidates=report.candidates if report else {},
            accumulators=self.boolean.accumulator_quantiles() if every and (step + 1) % every == 0 else {},
            learning_rate=self.learning_rate,
            gradient_norm=self.engine.gradient_norm,
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            memory=self.memory_bytes(),
            bytes_sent=sent,
            bytes_received=received,
        )

    def take_bytes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes sent, DeepSpeed's too, and received, by phase, since the last call."""
        sent = Counter(self.communicator.bytes_sent) + self.engine.take_communication()
        received = dict(self.communicator.bytes_received)
        self.communicator.bytes_sent.clear()
        self.communicator.bytes_received.clear()
        return dict(sent), received

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of this rank by category, and what the process holds in all."""
        student = self.engine.module
        held = [*student.parameters(), *student.buffers()]
        planes = [p for p in held if p.dtype == torch.int32]
        frozen = [p for p in held if p.dtype != torch.int32 and not p.requires_grad]
        teacher = self.teacher.parameters() if self.teacher is not None else []
        return {
            "planes": _held_bytes(planes),
            "frozen_floats": _held_bytes(frozen),
            "trained_floats_and_moments": self.engine.float_state_bytes(),
            **self.boolean.state_bytes(),
            "teacher": _held_bytes(teacher),
            "process": psutil.Process().memory_info().rss,
            **({"device_peak": torch.cuda.max_memory_allocated()} if self.device.type == "cuda" else {}),
        }

    def state_bytes_per_weight(self) -> float:
        """Training state of the linear layers on this rank, gradients of the floats included, a weight: what dense
        finetuning with AdamW needs 16 bytes for."""
        memory = self.memory_bytes()
        of_linear = ("planes", "trained_floats_and_moments", "accumulators", "curvature", "flip_bookkeeping")
        gradients = sum(p.nbytes for p in self.engine.module.parameters() if p.requires_grad)
        return (gradients + sum(memory[name] for name in of_linear)) / self.boolean.num_trained_weights

    # The end.

    def save(self) -> None:
        """Write the model folder from rank 0; under ZeRO-3 the parameters are gathered one at a time."""
        state = {name: tensor for name, tensor in self.engine.full_state() if tensor is not None}
        if self.communicator.rank == 0:
            folder = Path(self.config.run_dir) / "model"
            digest = hash_tensors({name: tensor for name, tensor in state.items() if ".plane_" in name})
            save_model(self.engine.module, self.tokenizer, folder, state)
            self.metrics.write("saved", folder=str(folder), planes_sha256=digest)

    def close(self) -> None:
        self.engine.close()


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _held_bytes(parameters) -> int:
    """Bytes that this rank keeps: its part of a parameter that ZeRO-3 partitioned, else all of it."""
    return sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in parameters)

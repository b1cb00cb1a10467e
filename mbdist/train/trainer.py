"""Finetunes a multi-Boolean model: student, teacher, data and both optimizers of one worker."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from mbdist.checkpoint import Checkpoint, CheckpointWriter, changed_settings, check_inputs
from mbdist.checkpoint.weights import ResumedWeights
from mbdist.comm.agreement import agree, share_launch_settings
from mbdist.comm.communicator import Communicator
from mbdist.config.schema import RunConfig
from mbdist.data import Batch, Batches, digest_of_windows, load_corpus
from mbdist.engine import Engine, place
from mbdist.errors import Interrupted, UserError
from mbdist.loss import LossTerms, hidden_loss, token_loss
from mbdist.model.hashing import TensorHash
from mbdist.model.layers import bits_per_weight, boolean_layers
from mbdist.model.loading import empty_model, load_tokenizer
from mbdist.model.readout import Head, Read, Readout
from mbdist.model.saving import save_gathered_model
from mbdist.model.weights import WeightFiles, Weights
from mbdist.optim import BooleanOptimizer, FlipReport, OptimizerOfBits
from mbdist.optim.parameter_groups import mean_magnitudes
from mbdist.plan import MemoryPlan, plan_memory, planned_model
from mbdist.train.environment import as_launched, compute_dtype
from mbdist.train.evaluate import evaluate
from mbdist.train.leaving_nodes import LeavingNodes
from mbdist.train.metrics import MetricsWriter
from mbdist.train.peak_memory import PeakMemory
from mbdist.train.prepare import preparation_key, student_source
from mbdist.train.run_folder import checkpoint_folder
from mbdist.train.stop_signals import StopRequest
from mbdist.train.teachers import LiveTeacher, load_teacher
from mbdist.train.trained_floats import choose_trained_floats
from mbdist_kernels import fold_key

_SAME_VERSIONS = ("mbdist", "torch", "deepspeed", "transformers")


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
        leaving: LeavingNodes | None = None,
    ):
        self.peak_memory = PeakMemory(device)
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
        student = empty_model(source)
        files = WeightFiles(source, student)
        self._inputs = {
            "model": preparation_key(config),
            # All ranks read the same windows: it is enough that one reads them all.
            "data.train": digest_of_windows(self.corpus.train) if communicator.rank == 0 else "",
            "weights": files.digest(),
        }
        self._inputs["data.train"] = communicator.all_gather_objects(self._inputs["data.train"], "agreement")[0]
        self._agree()
        share_launch_settings(communicator)
        self.bits_per_weight = bits_per_weight(student)
        self.planes = sorted({layer.num_planes for _, layer in boolean_layers(student)})
        choose_trained_floats(student, config.floats.also_train, self.dtype)
        trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
        magnitudes = mean_magnitudes(trained, files, communicator)
        weights: Weights = files
        if saved is not None:
            changed = changed_settings(saved.folder, saved.state, config)
            check_inputs(saved.folder, saved.state, self._inputs)
            weights = ResumedWeights(saved, files, dict(trained))
        place(student, weights, config, device, communicator.activity)
        if config.train.activation_checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False}, offload=config.train.offload_activations)
        with communicator.activity.unwatched("loading the teacher"):  # and fetching it
            self.teacher = load_teacher(
                config, device, self.dtype, self.corpus.train, student.config.get_text_config().vocab_size
            )
        communicator.activity.enter("setting up the optimizers")
        self.readout = Readout(student)
        self.boolean = optimizer(
            dict(boolean_layers(student)),
            config.boolean,
            as_launched(config).comm,
            communicator,
            total_steps=config.train.steps,
            micro_batches=config.accumulation,
            seed=config.seed,
            gradient_scale=communicator.world_size,
        )
        self.engine = Engine(student, self.boolean, config, communicator, magnitudes)
        self.stopping = stopping
        self.leaving = leaving or LeavingNodes(None)
        self.first_step = self.steps_done = self._saved_step = 0
        self.writer = CheckpointWriter(checkpoint_folder(config), config.checkpoint, communicator, metrics.write)
        self._say_what_was_decided()
        if saved is not None:
            self.boolean.load_state(saved.state["boolean"], saved)
            self.engine.load_state(saved.state["engine"], saved)
            self.first_step = self.steps_done = self._saved_step = saved.step
            metrics.write("resumed", step=saved.step, folder=str(saved.folder), changed=changed)

    def _agree(self) -> None:
        """Stop here, and not in a collective that never ends, where workers would compute different things."""
        of_this_worker = {"run_dir": True, "cluster": {"device", "cpus_per_worker"}, "data": {"cache_dir"}}
        sections = self.config.model_dump(mode="json", exclude=of_this_worker)
        facts = {f"the version of {name}": importlib.metadata.version(name) for name in _SAME_VERSIONS}
        for section, value in sections.items():
            settings = value.items() if isinstance(value, dict) else [("", value)]
            facts |= {f"{section}.{key}".removesuffix("."): repr(setting) for key, setting in settings}
        facts["the compute type (train.precision)"] = str(self.dtype)
        facts["the kind of device (cluster.device)"] = self.device.type
        facts["the number of workers on a machine (comm.node_size)"] = str(as_launched(self.config).comm.node_size)
        facts["the digest of the model's weights"] = self._inputs["weights"]
        agree(self.communicator, facts)

    def _say_what_was_decided(self) -> None:
        config = self.config
        self.planned_memory = self._plan_memory() if self.communicator.rank == 0 else None
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
            planes=self.planes,
            bits_per_weight=self.bits_per_weight,
            trained_weights={entry.name: entry.layer.num_weights for entry in self.boolean.accumulated},
            teacher=self.teacher.describe() if self.teacher is not None else "none",
            logits=self.readout.describe(),
            memory_predicted=self.planned_memory.total if self.planned_memory else None,
            memory_by_category=self.planned_memory.categories() if self.planned_memory else None,
        )

    def _plan_memory(self) -> MemoryPlan:
        config = as_launched(self.config)
        planned = planned_model(config, student_source(config))
        return plan_memory(planned, self.communicator.world_size, self.dtype, self.device.type)

    # Forward passes.

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def read_student(self, input_ids: torch.Tensor, read: Read, hidden: bool = False):
        """(the student's output, what ``read`` found in its last states)."""
        with self._autocast():
            return self.readout(self.engine.forward, read, input_ids, use_cache=False, output_hidden_states=hidden)

    def evaluate(self, name: str) -> float | None:
        """Measure, log and return held-out perplexity of the student, or of the teacher under the name ``float``; None
        where there is no teacher (of a cached one: where the cache does not know it)."""
        started = time.perf_counter()
        if name == "float" and not isinstance(self.teacher, LiveTeacher):
            known = self.teacher.perplexity(self.corpus.eval) if self.teacher is not None else None
            if known is not None:
                self.metrics.write("eval", name=name, step=self.steps_done, perplexity=known, seconds=0.0)
            return known
        self.engine.module.eval()
        found = evaluate(
            self.teacher.read if name == "float" else lambda ids, read: self.read_student(ids, read)[1],
            self.corpus.eval,
            self.config.train.eval_batch,
            self.communicator,
            self.device,
            between=self._between_batches,
        )
        self.engine.module.train()
        if name != "float":
            self.engine.end_evaluation()
        seconds = round(time.perf_counter() - started, 2)
        self.metrics.write("eval", name=name, step=self.steps_done, perplexity=found.perplexity, seconds=seconds)
        return found.perplexity

    def _between_batches(self) -> None:
        self.communicator.activity.enter("evaluating")
        if self._agreed()[0]:
            self._stop()

    # Training.

    def train(self) -> None:
        self.engine.module.train()
        self.peak_memory.restart()
        skipped = 0
        for step in range(self.first_step, self.config.train.steps):
            started = time.perf_counter()
            stop, save, ask = self._agreed(self.writer.is_due(step), step > self.first_step and self.leaving.due)
            if stop:
                self._stop()
            if (ask and self.leaving.asked()) or (save and step > self.first_step):
                self.checkpoint()
            report, losses = self.step(step)
            self.steps_done = step + 1
            skipped = 0 if report else skipped + 1
            self._log_step(step, report, losses, time.perf_counter() - started)
            if step == self.first_step + 1:  # the first one only measures curvature
                self._log_memory()
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
        if self.config.checkpoint.every_steps or self.config.checkpoint.every_minutes:
            self.checkpoint()  # what comes after may fail, of a full disk say
        self.communicator.activity.enter("writing a checkpoint")
        self.writer.wait()

    def _agreed(self, save: bool = False, ask: bool = False) -> tuple[bool, bool, bool]:
        """What all workers do now: (stop, as one was told to; save, and ask for nodes that leave, as rank 0 wants)."""
        told, first = self.stopping is not None and self.stopping.seen, self.communicator.rank == 0
        wishes = torch.tensor([told, first and save, first and ask], dtype=torch.int32, device=self.device)
        stop, save, ask = map(bool, self.communicator.all_reduce_sum(wishes, "statistics").tolist())
        return stop, save, ask

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
        state = {
            "step": self.steps_done,
            "perplexity": perplexity,
            "config": self.config.model_dump(mode="json"),
            "inputs": self._inputs,
            "boolean": self.boolean.shared_state(),
            "engine": self.engine.shared_state(),
        }
        pieces = [*self.boolean.state_pieces(), *self.engine.state_pieces()]
        if self.writer.save(self.steps_done, pieces, state):
            self._saved_step = self.steps_done

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
        batch, loss = batch.to(self.device), self.config.loss
        hidden = loss.hidden != "none"
        lesson = self.teacher.teach(batch, hidden) if self.teacher is not None else None
        sequences = self.config.train.sequences_per_step

        def read(states: torch.Tensor, head: Head) -> torch.Tensor:
            return token_loss(states, head, lesson, batch.input_ids, batch.learned, loss, targets, sequences)

        output, (total, kl, cross_entropy) = self.read_student(batch.input_ids, read, hidden)
        if hidden:
            total = total + hidden_loss(output.hidden_states[1:], lesson.hidden_states, batch.learned, loss, targets)
        return LossTerms(total, kl.item(), cross_entropy.item())

    def _check_replicas(self, step: int) -> None:
        differs = self.boolean.store.check_replicas(self.boolean.plane_names)
        if differs is not None:
            raise RuntimeError(f"after step {step} the ranks hold different planes; the first that differs: {differs}")

    def _log_step(self, step: int, report: FlipReport | None, losses: torch.Tensor, seconds: float) -> None:
        loss, kl, cross_entropy, _ = losses.tolist()
        tokens = self.config.tokens_per_step
        every = self.config.train.check_planes_every
        accumulators = self.boolean.accumulator_quantiles() if every and (step + 1) % every == 0 else {}
        sent, received = self.take_bytes()
        self.metrics.write(
            "step",
            step=step + 1,
            loss=loss,
            kl=kl if self.teacher is not None else None,
            cross_entropy=cross_entropy,
            skipped=report is None,
            flip_rate=report.flip_rate if report else 0.0,
            flip_cap=report.cap_rate if report else 0.0,
            flips=report.flips if report else {},
            flipped_back=report.flipped_back if report else {},
            flip_candidates=report.candidates if report else {},
            accumulators=accumulators,
            learning_rate=self.learning_rate,
            gradient_norm=self.engine.gradient_norm,
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            memory=self.memory_bytes(),
            bytes_sent=sent,
            bytes_received=received,
        )

    def _log_memory(self) -> None:
        peaks = self.communicator.all_gather_objects(self.peak_memory.peak_bytes(), "statistics")
        predicted = self.planned_memory.total if self.planned_memory else None
        self.metrics.write("memory", measured=max(peaks), predicted=predicted, of_workers=peaks)

    def take_bytes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes sent and received, DeepSpeed's too, by phase, since the last call."""
        counts = self.communicator.bytes_sent, self.communicator.bytes_received
        sent, received = (dict(count) for count in counts)
        for count in counts:
            count.clear()
        return sent, received

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
        """Write the model folder from rank 0, as the parameters are gathered, one at a time."""
        state = self.engine.full_state()
        planes = TensorHash()

        def hashed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in state:
                if ".plane_" in name:
                    planes.add(name, tensor)
                yield name, tensor

        try:
            if self.communicator.rank == 0:
                folder = Path(self.config.run_dir) / "model"
                layout = self.engine.full_layout()
                save_gathered_model(self.engine.module, self.tokenizer, folder, layout, hashed())
                self.metrics.write("saved", folder=str(folder), planes_sha256=planes.hexdigest())
        finally:  # all ranks gather to the end, also where rank 0 could not write
            for _ in state:
                pass

    def close(self) -> None:
        self.engine.close()


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _held_bytes(parameters) -> int:
    """Bytes that this rank keeps: its part of a parameter that ZeRO-3 partitioned, else all of it."""
    return sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in parameters)

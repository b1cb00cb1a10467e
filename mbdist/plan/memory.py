"""Memory of a worker, by category, from the sizes of a run's model and the real code on fake tensors.

What stays between steps is counted tensor by tensor, cut as ZeRO cuts it. Activations are those that a real forward
pass keeps; the temporaries are the peak of a real backward pass through the last block, where all other activations
are still there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.comm.partition import WordPartition
from mbdist.config.comm import CommConfig
from mbdist.config.schema import RunConfig
from mbdist.convert.blocks import block_names
from mbdist.engine.deepspeed_config import SMALL_FLOATS, gathered_in_passes, largest_block, reduce_bucket
from mbdist.engine.placement import resident_parameters
from mbdist.fake_tensors import LiveMemory, with_fake_tensors
from mbdist.model.layers import boolean_layers, embedding_and_head
from mbdist.model.readout import BLOCK_BYTES, chunk_tokens
from mbdist.optim.boolean import BooleanOptimizer
from mbdist.plan.model import PlannedModel
from mbdist.plan.paper_communicator import PaperCommunicator

_FP32 = 4
_TRACED_WORKERS = 16  # contributions are decoded one after the other: a thousand take no more memory, only time
_ROWS_AT_WORK = 6  # fp32 copies of a block of logits that are alive together
_ON_FIRST_USE = {"cpu": 64 << 20, "cuda": 0}  # what DeepSpeed, oneDNN and gloo take from a process


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker."""

    kept: dict[str, int]  # between steps, by category
    activations: int  # that wait for backward when forward ends
    loss: dict[str, int]  # besides, while the loss is computed
    backward: dict[str, int]  # besides, in the last block's backward
    mapped: int = 0  # of what is kept: files' pages, of which a machine has one for all of its workers

    @property
    def total(self) -> int:
        """At the fullest moment of a step."""
        return sum(self.categories().values())

    @property
    def of_the_student(self) -> int:
        """Kept between steps, besides the teacher and what operations keep for themselves."""
        return sum(size for name, size in self.kept.items() if name not in ("teacher", "scratch", "libraries"))

    @property
    def student_in_backward(self) -> int:
        """``of_the_student``, and what the last block's backward holds besides."""
        return self.of_the_student + self.activations + sum(self.backward.values())

    def categories(self) -> dict[str, int]:
        """What is held at the fullest moment."""
        fuller = max(self.loss, self.backward, key=lambda moment: sum(moment.values()))
        return {**self.kept, "activations": self.activations, **fuller}


def plan_memory(planned: PlannedModel, workers: int, dtype: torch.dtype, device: str) -> MemoryPlan:
    """Of worker 0 of ``workers``, which compute in ``dtype``. On ``cuda``: what torch allocates; on ``cpu``: what the
    process holds besides the interpreter and its libraries."""
    return with_fake_tensors(lambda memory: _plan(planned, workers, dtype, device, memory))


def _plan(planned: PlannedModel, workers: int, dtype: torch.dtype, device: str, memory: LiveMemory) -> MemoryPlan:
    config = planned.config.at_size(workers)
    student = planned.student(dtype)
    boolean = _optimizer(student, config, workers)
    resident = set(resident_parameters(student, config))
    kept = {
        **_parameter_bytes(student, resident, config, workers),
        **boolean.state_bytes(),
        **_accumulators_on_device(boolean, config),
        "teacher": _teacher_bytes(planned.teacher_model(dtype), config),
    }
    block, outside = _gathered_bytes(student, resident, config) if config.cluster.zero_stage == 3 else (0, 0)
    sink = boolean if workers <= _TRACED_WORKERS else _optimizer(student, config, _TRACED_WORKERS)
    activations, temporaries = _activation_bytes(student, sink, config, dtype, memory)
    largest = max(layer.num_weights for layer in boolean.layers.values())
    kept["scratch"] = largest * dtype.itemsize
    kept["libraries"] = _ON_FIRST_USE[device]
    return MemoryPlan(
        kept,
        activations,
        loss={"logits": _loss_bytes(student, config, dtype, device), "gathered": outside},
        backward={
            "temporaries": temporaries,
            "gathered": block,
            "communication": _communication_bytes(boolean, config.comm, workers),
        },
        mapped=kept["teacher"] if device == "cpu" and config.loss.teacher_placement == "resident" else 0,
    )


def _optimizer(student: PreTrainedModel, config: RunConfig, workers: int) -> BooleanOptimizer:
    """As after its first step: in that it only measures."""
    boolean = BooleanOptimizer(
        dict(boolean_layers(student)),
        config.boolean.model_copy(update={"offload_accumulators": False}),  # there is no device to fetch them to
        config.comm,
        PaperCommunicator(workers),
        total_steps=config.train.steps,
        micro_batches=config.accumulation,
        seed=config.seed,
    )
    boolean.curvature.steps = 1
    return boolean


def _accumulators_on_device(boolean: BooleanOptimizer, config: RunConfig) -> dict[str, int]:
    """Of those in host memory: two matrices' at a time, one that comes and one that goes."""
    sizes = [entry.accumulator.nbytes for entry in boolean.accumulated]
    return {"accumulators": min(sum(sizes), 2 * max(sizes)) if config.boolean.offload_accumulators else sum(sizes)}


def _part(count: int, workers: int) -> int:
    """Elements of a worker's part of a tensor: DeepSpeed's cut."""
    return WordPartition(count, workers).words_per_rank


def _parameter_bytes(
    student: PreTrainedModel, resident: set[nn.Parameter], config: RunConfig, workers: int
) -> dict[str, int]:
    """Planes, floats, and what DeepSpeed keeps of the trained floats."""
    stage = config.cluster.zero_stage

    found = dict.fromkeys(("planes", "frozen_floats", "trained_floats_and_moments", "gradients"), 0)
    trained = 0
    for parameter in student.parameters():
        if not parameter.requires_grad:
            whole = stage < 3 or parameter in resident
            count = parameter.numel() if whole else _part(parameter.numel(), workers)
            kind = "planes" if parameter.dtype == torch.int32 else "frozen_floats"
            found[kind] += parameter.element_size() * count
        else:
            trained += parameter.numel()
            if stage == 3:
                persistent = parameter.numel() if parameter.numel() <= SMALL_FLOATS else 0
                found["trained_floats_and_moments"] += _FP32 * (_part(parameter.numel(), workers) + persistent)
    own = trained if stage == 0 else _part(trained, workers)
    values = 0 if stage == 3 else trained
    masters = 0 if stage == 0 else own
    found["trained_floats_and_moments"] += _FP32 * (values + masters + 2 * own)
    bucket = 0 if stage == 0 else reduce_bucket(trained)
    found["gradients"] = _FP32 * ((trained if stage < 2 else own) + bucket)
    return found


def _gathered_bytes(student: PreTrainedModel, resident: set[nn.Parameter], config: RunConfig) -> tuple[int, int]:
    """Under stage 3, what DeepSpeed holds at a time, (in the last block's backward, while the loss is computed): two
    blocks, and the head; or all that is used again."""
    gathered = set(gathered_in_passes(p for p in student.parameters() if p not in resident))
    embedding, head = embedding_and_head(student)
    if config.comm.keeps_gathered(sum(p.nbytes for p in gathered)):
        used_last = {embedding} if embedding.requires_grad or config.train.activation_checkpointing else set()
        in_backward = gathered - ({embedding, head} - used_last)
        return sum(p.nbytes for p in in_backward), sum(p.nbytes for p in in_backward | gathered & {head})
    block = largest_block((name, p) for name, p in student.named_parameters() if p in gathered)
    return 2 * _FP32 * block, max((p.nbytes for p in gathered & {embedding, head}), default=0)


def _activation_bytes(
    student: PreTrainedModel,
    boolean: BooleanOptimizer,
    config: RunConfig,
    dtype: torch.dtype,
    memory: LiveMemory,
) -> tuple[int, int]:
    """(kept by a forward pass of the body for backward, the most that backward needs besides)."""
    student.train()
    blocks = block_names(student, boolean.layers)
    if config.train.activation_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    before_last: list[torch.Tensor] = []
    last_block = student.get_submodule(blocks[-1])
    ids = torch.zeros(config.train.micro_batch, config.data.window, dtype=torch.int64)
    held = memory.restart_peak()
    hook = last_block.register_forward_pre_hook(
        lambda _block, args, kwargs: before_last.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        states = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    kept = memory.restart_peak() - held
    torch.autograd.grad(states, before_last[0], torch.ones_like(states), allow_unused=True)
    boolean.finish_micro_batch()
    temporaries = max(0, memory.peak_bytes - held - kept)
    if config.train.offload_activations:  # all but what comes and what goes is in host memory
        kept = min(kept, 2 * kept // len(blocks))
    return kept, temporaries


def _communication_bytes(boolean: BooleanOptimizer, comm: CommConfig, workers: int) -> int:
    """Buckets: one that fills, and sent and received ones on the wire. (The whole signals that are added up inside a
    machine first are there while a block is computed alone, where they are counted.)"""
    if workers == 1:
        return 0
    receivers = workers // (comm.summing_nodes(workers) or 1)
    messages = [4 * receivers * boolean.reduction.codec.message_words(entry.segments) for entry in boolean.accumulated]
    bucket = max(comm.bucket_bytes, max(messages))
    return min(2 * sum(messages), bucket * (1 + 2 * comm.in_flight))


def _teacher_bytes(teacher: PreTrainedModel | None, config: RunConfig) -> int:
    """Of one worker; what a sharded one gathers at a time included."""
    if teacher is None:
        return 0
    if config.loss.teacher_placement == "resident":
        return sum(parameter.nbytes for parameter in teacher.parameters())
    workers = config.cluster.most_workers
    parts = sum(_part(p.numel(), workers) * p.element_size() for p in teacher.parameters())
    blocks = largest_block(teacher.named_parameters()) * max(p.element_size() for p in teacher.parameters())
    return parts + max(3 * blocks, teacher.get_output_embeddings().weight.nbytes)


def _loss_bytes(student: PreTrainedModel, config: RunConfig, dtype: torch.dtype, device: str) -> int:
    """A chunk's logits and their gradient, and the teacher's logits; the gradient of all states before the head. On a
    CPU the head too: in bf16 twice, as oneDNN keeps it in layouts for both passes, in fp32 once, as was measured."""
    text = student.config.get_text_config(decoder=True)
    tokens = config.train.micro_batch * config.data.window
    chunk = min(tokens, config.loss.chunk_tokens or chunk_tokens(text.vocab_size, device))
    copies = 2 + (config.loss.teacher == "float")
    elements = copies * chunk * text.vocab_size + 2 * tokens * text.hidden_size
    if device == "cpu":
        copies_of_head = 1 if dtype == torch.float32 else 2
        elements += copies_of_head * text.vocab_size * text.hidden_size
    return elements * dtype.itemsize + _ROWS_AT_WORK * BLOCK_BYTES[device]

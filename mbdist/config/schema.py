"""Every setting of a run, documented where it is declared; ``mbdist config schema`` prints it as JSON schema."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mbdist.config.checkpoint import CheckpointConfig
from mbdist.config.cluster import LAUNCHERS_OWN, ClusterConfig
from mbdist.config.section import Section as _Section


class ModelConfig(_Section):
    path: str
    """A local folder, a hub id, or ``package:NAME`` for the folder of an installed Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`, where the weights are in that format."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class TextSource(_Section):
    type: Literal["text"]
    """Plain text files."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or shell patterns, read in order."""


class RecordsSource(_Section):
    type: Literal["json", "parquet"]
    """Records in local files: JSON, JSON lines or parquet."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or shell patterns, read in order."""
    text_field: str = "text"
    """Field that holds the text of a record."""
    messages_field: str | None = None
    """Field that holds a chat, a list of {role, content}; used instead of `text_field` where given."""


class HubSource(_Section):
    type: Literal["hub"]
    """A data set of the Hugging Face hub."""
    name: str
    """Hub id."""
    subset: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split, in the hub's slicing syntax (`train[:5%]`)."""
    text_field: str = "text"
    """Field that holds the text of a record."""
    messages_field: str | None = None
    """Field that holds a chat, a list of {role, content}; used instead of `text_field` where given."""


class PythonDocsSource(_Section):
    type: Literal["python_docs"]
    """The Python language reference from the standard library: 465 KB of English prose that needs no download."""


DataSource = Annotated[TextSource | RecordsSource | HubSource | PythonDocsSource, Field(discriminator="type")]


class ReconstructionConfig(_Section):
    steps: Annotated[int, Field(ge=0)] = 40
    """Steps a block, of one batch (2048 tokens) of the calibration text each, over and over; 0 leaves planes as the
    error feedback put them. More steps want more `calibration_tokens`: bits learn a text seen thrice by heart."""
    lr: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW learning rate of the scales, as a share of their size."""
    planes: Literal["levels", "last", "all"] = "levels"
    """What flips, as in `boolean.planes`."""
    step_size: Annotated[float, Field(ge=0)] = 0.03
    """As in `boolean.step_size`, with `boolean.signal: curvature`; 0 trains scales alone."""
    max_flip_rate: Annotated[float, Field(ge=0, le=1)] = 6e-3
    """As in `boolean.max_flip_rate`: errors of a block are seen so well that far more may flip here."""
    accumulator: Literal["int8", "int4", "fp32"] = "int8"
    """As in `boolean.accumulator`."""


class ConvertConfig(_Section):
    planes: Annotated[int, Field(ge=1, le=8)] = 2
    """K: sign planes of every matrix. Ignored where `model.path` is a multi-Boolean model already."""
    bits: Annotated[float, Field(gt=0)] | None = None
    """Budget of average bits a weight, scales included (2.5, say), instead of `planes`: every matrix gets the number of
    planes with which the budget does most."""
    max_planes: Annotated[int, Field(ge=1, le=8)] = 4
    """With `bits`: most planes that a matrix may get."""
    allocation: Literal["second_order", "residual"] = "second_order"
    """With `bits`: what is minimised. `second_order`: the estimated change of the loss; needs text. `residual`: the
    paper's objective on the norms of the residuals; needs none."""
    init: Literal["svid", "joint", "calibrated"] = "calibrated"
    """How planes are found. `svid`: one after the other (arXiv 2505.22811). `joint`: all together, in sweeps of nearest
    levels and least squares. `calibrated`: joint in the metric of the layers' inputs and output gradients, then error
    feedback on the signs; it needs text, and is worth orders of magnitude of perplexity."""
    calibration: DataSource | None = None
    """Text to calibrate on. Default: the training text, without the windows that are held out for evaluation."""
    calibration_tokens: PositiveInt = 32768
    """Tokens of it that are looked at."""
    sequential: bool = False
    """With `calibrated`: convert a block before the inputs of the next one are computed, so that later blocks see the
    errors of earlier ones. false: all blocks see the float model's activations."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """With `calibrated`: bits and scales of every block are finetuned to the float block's outputs as soon as it is
    converted, on the calibration text."""
    include: list[str] = ["*"]
    """Layer names to convert, as shell patterns over module names (`model.layers.*.mlp.*`)."""
    exclude: list[str] = []
    """Layer names to leave in floating point; the LM head and the embeddings always are."""

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are finetuned to the float blocks' outputs."""
        return self.init == "calibrated" and self.reconstruction.steps > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether converting takes text."""
        return self.init == "calibrated" or (self.bits is not None and self.allocation == "second_order")


class DataConfig(_Section):
    train: DataSource
    """What to finetune on."""
    eval: DataSource | None = None
    """What perplexity is measured on. Left out, the last `eval_fraction` of the training windows is held out."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training windows that is held out where `eval` is not given."""
    window: Annotated[int, Field(ge=8)] = 512
    """Tokens a sequence. Documents are joined by the end-of-text token and cut into windows."""
    max_eval_windows: PositiveInt | None = None
    """Measure perplexity on the first so many windows only."""
    cache_dir: str | None = None
    """Where tokenised data is kept; default: the `datasets` library's cache folder."""


class TrainConfig(_Section):
    steps: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps. 0 converts, measures and saves."""
    sequences_per_step: PositiveInt = 8
    """Global batch: sequences an optimizer step over all workers. Accumulation follows from it."""
    micro_batch: PositiveInt = 4
    """Sequences a worker holds at a time in a forward and backward pass."""
    eval_batch: PositiveInt = 8
    """Sequences a worker holds at a time in an evaluation."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload_activations: bool = False
    """With `activation_checkpointing`: GPU workers hold what the recomputation starts from in pinned host memory
    meanwhile."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping of the float parameters; 0 turns it off."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type. `auto`: bf16 where the processor multiplies it in hardware, else fp32."""
    max_skipped_steps: PositiveInt = 10
    """Stop after so many steps in a row had to be skipped because a loss or a signal was not finite."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 1800
    """A worker that makes no progress for so many seconds says what it was doing and ends, for its launcher to replace
    it. Longer than any one forward or backward pass, collective, evaluation batch, block of a conversion or download of
    a data set takes."""
    track: list[Literal["tensorboard", "wandb"]] = []
    """Besides `metrics.jsonl`: TensorBoard in `run_dir/tensorboard`, W&B as its own `WANDB_*` variables say."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Measure held-out perplexity every so many steps; 0: before and after training alone."""
    check_planes_every: Annotated[int, Field(ge=0)] = 20
    """Compare a hash of the planes over all workers, and log how full the accumulators are, every so many steps; 0
    turns it off."""
    probe_every: Annotated[int, Field(ge=0)] = 0
    """Every so many steps measure what the step's flips did to the loss of its own batch, beside what the second-order
    estimate predicted (`boolean.signal: curvature`): one more forward pass there, and 4 bytes a weight. 0: never."""


_PlaneNumber = Annotated[int, Field(ge=0)]


class BooleanOptimizerConfig(_Section):
    planes: Literal["levels", "last", "all", "alternating"] | Annotated[list[_PlaneNumber], Field(min_length=1)] = (
        "last"
    )
    """What flips. `last`: the last plane alone, the paper's choice. `levels`: the bits that take a weight to its next
    level, in whatever planes; one accumulator a weight too. `all`, or a list of plane numbers: each of these planes by
    itself, with an accumulator of its own. `alternating`: one plane after the other."""
    alternate_every: PositiveInt = 10
    """With `alternating`: steps before it is the next plane's turn."""
    signal: Literal["curvature", "evidence", "rms", "raw"] = "evidence"
    """`evidence`: q summed over the last 64 micro-batches of all workers (since the bit flipped, older ones fade), in
    standard errors of that sum; the threshold is 1 / step_size of them (5), so that noise alone does not fill the
    accumulators, however long the run. `curvature`: q / (s^2 h), so the threshold is where a flip pays to second order;
    wants a small step_size (0.05), and signals that stand out of their noise in a few steps, as those of a block's
    reconstruction do. `rms`: q over its root mean square. `raw`: q as published."""
    step_size: Annotated[float, Field(ge=0)] = 0.2
    """eta: what one step adds to an accumulator is eta times the signal; a bit flips at 1. 0 turns flips off."""
    adapt_step_size: bool = False
    """Lower eta of a matrix while many more of its weights reach the threshold than the cap lets move, so that those
    that move are the best and not any; it recovers, up to `step_size`."""
    max_step: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Most that one step may add to an accumulator: 1 / max_step steps must agree before a bit flips. Every
    micro-batch of every worker may add its equal share (`evidence`: one by the root of their number), rounded
    stochastically to the accumulator's unit."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What a step keeps of an accumulator, besides beta = 1 - share of bits just flipped (`evidence` has a decay of its
    own instead). Below 1 old evidence fades, and a bit flips only where recent steps agree: noise alone stays at about
    max_step / sqrt(1 - decay^2)."""
    guard: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Against oscillation: after a flip the accumulator starts this far behind zero, so that flipping back takes more
    evidence than flipping did."""
    max_flip_rate: Annotated[float, Field(ge=0, le=1)] = 3e-4
    """Cap: largest share of a matrix's weights that moves in a step, after warm-up; falls to 0 by a cosine."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the cap rises to its full value."""
    curvature_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Smoothing over steps of the curvature estimate h."""
    accumulator: Literal["int8", "int4", "fp32"] = "int8"
    """How an accumulator is kept. `int8` takes a byte a weight; `int4` takes half of one and has a unit of a quarter of
    the threshold; `fp32` is the reference."""
    offload_accumulators: bool = False
    """GPU workers keep their accumulators in pinned host memory. They are fetched while their signals travel, and go
    back while the backward pass continues."""
    turns: PositiveInt = 1
    """Matrices take turns: in a step one in so many sends its signal and flips, and the accumulators of the others stay
    as they are. 4: a quarter of the signal's bytes, and a matrix trains in every fourth step. 1: all in every step."""


class FloatOptimizerConfig(_Section):
    lr: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW learning rate of the scales, by default as a share of their size."""
    relative_lr: bool = True
    """Multiply learning rates by the mean magnitude of each parameter tensor (to the nearest power of two), so that one
    value suits every model. false: they are absolute, as in the paper."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW moment decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the learning rate rises; then a cosine to 0."""
    also_train: list[str] = []
    """More float parameters to train, as shell patterns over parameter names (`*norm*`, `*embed_tokens*`)."""
    also_train_lr: Annotated[float, Field(ge=0)] = 2e-3
    """Their learning rate."""


class TeacherCacheConfig(_Section):
    path: str | None = None
    """Folder of the cache, to be shared by runs on the same data; default: `teacher_cache` in `run_dir`."""
    top_k: PositiveInt = 32
    """The teacher's most likely tokens that are kept of every position, all others counting as one. A cache of more
    serves too. On disk 3 k + 4 bytes a token (5 k + 4 where the vocabulary is above 65,536)."""


class LossConfig(_Section):
    teacher: Literal["float", "cached", "none"] = "float"
    """`float`: distil from the float model that was converted, or from `teacher_model`. `cached`: from its most likely
    tokens, as `mbdist teacher cache` wrote them to disk; no teacher is in memory. `none`: text alone."""
    teacher_model: ModelConfig | None = None
    """Another teacher than `model.path`, needed where that is multi-Boolean already. It may be a multi-Boolean model
    itself, of four planes say: its planes stay packed in memory."""
    teacher_placement: Literal["resident", "sharded"] = "resident"
    """`resident`: every worker holds the teacher. `sharded`: ZeRO-3 partitions it over the workers, each of which
    gathers a block at a time. With `cached`: of `mbdist teacher cache`."""
    cache: TeacherCacheConfig = TeacherCacheConfig()
    """With `teacher: cached`, and for `mbdist teacher cache`."""
    chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at a time in a training step, of student and teacher each; null: as many as fit into
    64 MiB of fp32 on a CPU, 256 MiB on a GPU. A model that does more than apply its head to the last hidden state
    (soft caps, scales) gives whole logits."""
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(teacher || student)."""
    kl_reduction: Literal["per_token", "batchmean"] = "per_token"
    """`per_token`: mean over tokens. `batchmean`: summed over the positions of a sequence, the paper's protocol."""
    top_k: PositiveInt | None = None
    """KL over a live teacher's most likely tokens only, all others counting as one; null for the whole vocabulary."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature of the KL term."""
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the next-token cross-entropy. With `teacher: none` it is the whole loss and counts as 1 if 0."""
    hidden: Literal["none", "mse", "normalised"] = "none"
    """Match the hidden states after every block: plain squared error, or of the states scaled to unit length."""
    hidden_weight: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the hidden-state term (gamma; the paper: 10)."""


class CommConfig(_Section):
    codec: Literal["fp32", "bf16", "int8", "int4", "sign", "sign_unbiased"] = "sign"
    """How the Boolean signal travels to the worker that owns the accumulators: whole, or in 8, 4 or 1 bits a weight
    beside one scale a row. `sign`, the smallest, ended within 0.1 % of the loss of `fp32`
    (docs/benchmarks.md). `sign_unbiased` draws the signs, so that their mean is the signal."""
    magnitudes: Literal["row", "rank1"] = "rank1"
    """Magnitudes of what a codec of 8 bits or less writes: one a row, or a row's times a column's. The columns' are
    those of the curvature estimate, which every worker has, so both cost the same bytes."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25
    """Messages of many matrices leave together, in buckets of so many MiB."""
    node_size: PositiveInt | Literal["auto"] | None = None
    """Consecutive workers that share a machine: their signals are added up there first, and one message a machine
    crosses the slow links. `auto`: as the launcher placed them. null: all workers send to all; then the bits do not
    depend on how workers are placed."""
    in_flight: PositiveInt = 2
    """So many buckets may be on the wire while the backward pass continues."""
    float_gradients: Literal["fp32", "bf16"] = "fp32"
    """How DeepSpeed reduces the gradients of scales and other trained floats."""
    resident_planes: Literal["none", "frozen", "all"] = "none"
    """With ZeRO stage 3: planes that every worker keeps whole, instead of gathering them in every forward and backward
    pass. `frozen`: those that are not trained, at one bit a weight each. `all`: flips are sent then."""
    resident_floats: Literal["none", "frozen"] = "none"
    """The same of float parameters: `frozen` keeps the embeddings and norms that are not trained."""
    keep_gathered_gb: Annotated[float, Field(ge=0)] = 1.0
    """With ZeRO stage 3: where all that a pass gathers fits into so many GiB, the backward pass uses what the forward
    pass has gathered; else, and with 0, blocks are gathered in both. (To keep planes from step to step is
    `resident_planes`.)"""
    timeout_s: PositiveInt = 600
    """Seconds after which a collective that a peer never joined is an error."""

    @property
    def bucket_bytes(self) -> int:
        return int(self.bucket_mb * 2**20)

    def keeps_gathered(self, size: int) -> bool:
        """Whether ``size`` bytes stay gathered from the forward to the backward pass."""
        return size <= self.keep_gathered_gb * 2**30

    def summing_nodes(self, workers: int) -> int | None:
        """``node_size``, a number by now, where there are several such nodes with something to add up."""
        return self.node_size if isinstance(self.node_size, int) and 1 < self.node_size < workers else None


class RunConfig(_Section):
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
        if self.train.probe_every and self.boolean.signal != "curvature":
            problems.append(
                f"train.probe_every predicts from q / (s^2 h), which boolean.signal = {self.boolean.signal} does not "
                "give: set boolean.signal to curvature (and boolean.step_size to 0.05), or train.probe_every to 0"
            )
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

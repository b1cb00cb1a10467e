"""What is minimised, and who teaches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mbdist.config.model import ModelConfig
from mbdist.config.section import Section


class TeacherCacheConfig(Section):
    path: str | None = None
    """Folder of the cache, to be shared by runs on the same data; default: `teacher_cache` in `run_dir`."""
    top_k: PositiveInt = 32
    """The teacher's most likely tokens that are kept of every position, all others counting as one. A cache of more
    serves too. On disk 3 k + 4 bytes a token (5 k + 4 where the vocabulary is above 65,536)."""


class LossConfig(Section):
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

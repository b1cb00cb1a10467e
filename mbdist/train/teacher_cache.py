"""A teacher on disk: the most likely tokens of every position of every training window, written once by ``mbdist
teacher cache``, read by window number.

A folder holds ``cache.json`` (what the cache was made of) and parts, safetensors files of equal numbers of consecutive
windows, each written beside and renamed: a part that is there is whole, so what was interrupted goes on, and workers
need no word between them. In a part, for every position t but a window's last (it predicts token t + 1):

    tokens  (windows, window - 1, k) uint16 or uint32   the k most likely, in falling order
    steps   (windows, window - 1, k) uint8              log q_1 - log q_i in units of ``unit``
    unit    (windows, window - 1) float16
    rest    (windows, window - 1) float16               log of the probability of all other tokens

log q_1 follows, since all of it adds up to 1. bf16 logits of 20 are rounded by 1/16; a unit is some 1/30 nat.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import safetensors
import safetensors.numpy
import torch

from mbdist.config.model import ModelConfig
from mbdist.config.schema import RunConfig
from mbdist.data import Batch, digest_of_windows
from mbdist.errors import UserError
from mbdist.loss import TopTokens, log_of_the_rest
from mbdist.model.hashing import fingerprint_files
from mbdist.model.loading import resolve_path
from mbdist.whole_files import write_whole

_FORMAT = 2
_PART_BYTES = 64 << 20
_FEWEST_PARTS = 64  # of a small cache too: what workers share out
_OPEN_PARTS = 128
_WEIGHT_FILES = ("*.safetensors", "*.gguf", "config.json")

_DATA = "the training windows (data.train, data.window, data.eval, the tokenizer)"
_TEACHER = "the teacher (loss.teacher_model, or model)"
_TEMPERATURE = "loss.temperature"


@dataclass(frozen=True)
class CacheHeader:
    """``cache.json``."""

    facts: dict[str, str]  # what the cache depends on, by name
    num_windows: int
    window: int
    vocabulary: int
    top_k: int
    windows_a_part: int
    teacher: str  # as the config named it, for a reader
    held_out: dict | None = None  # {"windows": digest, "perplexity": the teacher's}
    format: int = _FORMAT

    @classmethod
    def of(cls, config: RunConfig, windows: datasets.Dataset, teacher: ModelConfig, vocabulary: int) -> CacheHeader:
        """Of a cache that is still to be written."""
        top_k, length = min(config.loss.cache.top_k, vocabulary), config.data.window
        of_window = (length - 1) * bytes_a_token(top_k, vocabulary)
        a_part = max(1, min(_PART_BYTES // of_window, len(windows) // _FEWEST_PARTS))
        facts = _facts(config, windows, teacher)
        return cls(facts, len(windows), length, vocabulary, top_k, a_part, teacher.path)

    @classmethod
    def read(cls, folder: Path) -> CacheHeader | None:
        """None where the folder holds no cache."""
        try:
            found = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
            return cls(**found) if found.get("format") == _FORMAT else None
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        write_whole(folder / "cache.json", json.dumps(asdict(self), indent=2).encode())

    def part(self, number: int) -> tuple[str, range]:
        """(file name, windows) of a part."""
        first = number * self.windows_a_part
        last = min(first + self.windows_a_part, self.num_windows)
        return f"windows_{first:09d}.safetensors", range(first, last)

    def missing_parts(self, folder: Path) -> list[int]:
        there = {file.name for file in folder.glob("windows_*.safetensors")}
        return [number for number in range(self.num_parts) if self.part(number)[0] not in there]

    @property
    def num_parts(self) -> int:
        return -(-self.num_windows // self.windows_a_part)

    def check_against(self, other: dict[str, str], folder: Path) -> None:
        """Raises UserError, which lists what differs."""
        differing = [name for name, value in other.items() if self.facts.get(name) != value]
        if differing:
            raise UserError(
                f"the teacher cache {folder} (of {self.teacher}) is of a run with other settings; these differ:\n  "
                + "\n  ".join(differing)
                + "\nSet them back, or write another cache: mbdist teacher cache RUN.YAML -o FOLDER, and "
                "loss.cache.path=FOLDER"
            )


def bytes_a_token(top_k: int, vocabulary: int) -> int:
    """On disk."""
    return top_k * (1 + _token_type(vocabulary)().nbytes) + 4


def cache_folder(config: RunConfig) -> Path:
    return Path(config.loss.cache.path or Path(config.run_dir) / "teacher_cache")


def write_part(file: Path, windows: Sequence[TopTokens], vocabulary: int) -> None:
    """A part, from what the teacher says about the positions of every one of its windows."""
    rows = [_quantised(window, vocabulary) for window in windows]
    write_whole(file, safetensors.numpy.save({name: np.stack([each[name] for each in rows]) for name in rows[0]}))


class CachedTeacher:
    """Reads a cache, and teaches as a ``LiveTeacher`` does; ``loss.cache.top_k`` of its tokens, if it holds more."""

    def __init__(
        self,
        config: RunConfig,
        windows: datasets.Dataset,  # the run's training windows
        teacher: ModelConfig | None,  # None: whichever wrote the cache
        device: torch.device,
    ):
        """Raises UserError for a cache that is not there, not complete, or of another run."""
        self.folder, self._device = cache_folder(config), device
        header = CacheHeader.read(self.folder)
        if header is None:
            raise UserError(
                f"loss.teacher is cached, but {self.folder} holds no teacher cache: write it with mbdist teacher cache "
                "RUN.YAML, or name its folder in loss.cache.path"
            )
        header.check_against(_facts(config, windows, teacher), self.folder)
        if missing := header.missing_parts(self.folder):
            raise UserError(
                f"the teacher cache {self.folder} has {header.num_parts - len(missing)} of its {header.num_parts} "
                "parts: mbdist teacher cache RUN.YAML writes the others"
            )
        if header.top_k < min(config.loss.cache.top_k, header.vocabulary):
            raise UserError(
                f"the teacher cache {self.folder} holds {header.top_k} tokens of a position, less than "
                f"loss.cache.top_k = {config.loss.cache.top_k}: set that to {header.top_k}, or write another cache"
            )
        self.header, self.top_k = header, config.loss.cache.top_k
        self._opened = functools.lru_cache(_OPEN_PARTS)(self._open)

    def teach(self, batch: Batch, hidden: bool = False) -> _CachedLesson:
        rows = [self._read(number) for number in batch.windows]
        return _CachedLesson(*(torch.cat(each).to(self._device) for each in zip(*rows, strict=True)))

    @property
    def vocabulary(self) -> int:
        return self.header.vocabulary

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter(())

    def describe(self) -> str:
        return f"{self.header.teacher}, {self.top_k} tokens of every position cached in {self.folder}"

    def perplexity(self, held_out: datasets.Dataset) -> float | None:
        """The teacher's, where it was measured on the same windows when the cache was written."""
        known = self.header.held_out
        return known["perplexity"] if known is not None and known["windows"] == digest_of_windows(held_out) else None

    def _read(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``TopTokens`` of a window's positions."""
        part, offset = divmod(number, self.header.windows_a_part)
        opened = self._opened(part)
        found = _restored({name: opened.get_slice(name)[offset] for name in opened.keys()})  # noqa: SIM118
        tokens, log_q, log_rest = found.tokens, found.log_q, found.log_rest
        if self.top_k < self.header.top_k:
            left = log_q[:, self.top_k :].logsumexp(-1, keepdim=True)
            tokens, log_q, log_rest = tokens[:, : self.top_k], log_q[:, : self.top_k], torch.logaddexp(log_rest, left)
        return tokens, log_q, log_rest

    def _open(self, part: int) -> safetensors.safe_open:
        file = self.folder / self.header.part(part)[0]
        try:
            return safetensors.safe_open(file, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read {file} of the teacher cache: {error}; remove it and write it again") from None


@dataclass(frozen=True)
class _CachedLesson:
    """Of (batch * (window - 1),) positions."""

    tokens: torch.Tensor
    log_q: torch.Tensor
    log_rest: torch.Tensor
    hidden_states: None = None

    @contextlib.contextmanager
    def opened(self, is_target: torch.Tensor) -> Iterator[TopTokens]:
        yield TopTokens(self.tokens[is_target], self.log_q[is_target], self.log_rest[is_target])


def _facts(config: RunConfig, windows: datasets.Dataset, teacher: ModelConfig | None) -> dict[str, str]:
    known = {_TEACHER: _fingerprint_of(teacher)} if teacher is not None else {}
    return {_DATA: digest_of_windows(windows), _TEMPERATURE: repr(config.loss.temperature), **known}


def _fingerprint_of(teacher: ModelConfig) -> str:
    """Of a local model's files, wherever they lie; of a hub model's name."""
    folder = Path(resolve_path(teacher.path))
    files = fingerprint_files(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
    described = files or [teacher.path, teacher.revision]
    return hashlib.sha256(json.dumps([described, teacher.gguf_file]).encode()).hexdigest()


def _token_type(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def _quantised(top: TopTokens, vocabulary: int) -> dict[str, np.ndarray]:
    below = (top.log_q[:, :1] - top.log_q).double().numpy()
    unit = np.nextafter((below[:, -1:] / 255).astype(np.float16), np.float16(np.inf))  # 255 of them reach the last
    return {
        "tokens": top.tokens.numpy().astype(_token_type(vocabulary)),
        "steps": np.rint(below / unit.astype(np.float64)).astype(np.uint8),
        "unit": unit[:, 0],
        "rest": top.log_rest[:, 0].numpy().astype(np.float16),
    }


def _restored(part: dict[str, np.ndarray]) -> TopTokens:
    log_q = -torch.from_numpy(part["steps"].astype(np.float32) * part["unit"].astype(np.float32)[:, None])
    log_rest = torch.from_numpy(part["rest"].astype(np.float32)[:, None])
    log_q += log_of_the_rest(log_rest) - log_q.logsumexp(-1, keepdim=True)
    return TopTokens(torch.from_numpy(part["tokens"].astype(np.int64)), log_q, log_rest)

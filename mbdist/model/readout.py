"""A causal LM cut before its head, so that logits exist for some tokens at a time.

[tokens, vocabulary] is the largest activation of a step: 8,192 tokens of a vocabulary of 128,000 are 2 GiB in bf16, and
a teacher has as many. Whoever needs logits is called *in place of* the head, with the states before it and the head's
own product: what it returns takes the logits' place in the model's output. So the head runs where the model runs it,
inside the hooks that gather its weight under ZeRO-3, once a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.fake_tensors import with_fake_tensors

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # logits of a product; a weight of 128,000 rows is worth many
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # fp32 rows that are worked on at a time: on a CPU they stay in cache
_PROBE_TOKENS = 8
_PLAIN = {"dtype": torch.bfloat16, "attn_implementation": "eager"}  # shows conversions, and wants no real device


@dataclass(frozen=True)
class Head:
    """What turns rows of states into logits."""

    logits: Callable[[torch.Tensor], torch.Tensor]  # (rows, d) -> (rows, V); outside autograd's view, see ``trained``
    vocabulary: int  # V
    trained: list[nn.Parameter] = field(default_factory=list)  # parameters of it that want a gradient

    def chunks(self, rows: torch.Tensor, bound: int | None) -> Iterator[slice]:
        """Consecutive rows whose logits may exist at a time; null: as many as fit into a bound of bytes."""
        return _slices(len(rows), bound or chunk_tokens(self.vocabulary, rows.device.type))


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits may exist at a time on a kind of device, where a config does not say."""
    return max(1, _CHUNK_BYTES[device] // (4 * vocabulary))


def blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Consecutive rows of a chunk (rows, V) to work on in fp32 at a time."""
    return _slices(len(logits), max(1, BLOCK_BYTES[logits.device.type] // (4 * logits.shape[-1])))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def target_rows(
    states: torch.Tensor,  # (batch, window, d)
    is_target: torch.Tensor,  # (batch * (window - 1),) bool: whether token t + 1 is to be learned
) -> torch.Tensor:
    """The positions that predict a target, flat: (T, d). Position t predicts token t + 1."""
    flat = states[:, :-1].reshape(-1, states.shape[-1])
    return flat if bool(is_target.all()) else flat[is_target]


Read = Callable[[torch.Tensor, Head], torch.Tensor]  # (states (batch, window, d), head) -> what is wanted of them
Reader = Callable[[torch.Tensor, Read], torch.Tensor]  # (ids (batch, window), read) -> what ``read`` returned


class Readout:
    """Has a model's head read by a function.

    A model that does more than ``lm_head(states)`` (soft caps, scales) gives whole logits: ``read`` is called with them
    as states and a head that changes nothing.
    """

    def __init__(self, model: PreTrainedModel):
        self.head_module = model.get_output_embeddings()
        self.whole_since = _why_whole(model)  # None: it is cut before its head
        self._read: Callable[[torch.Tensor], torch.Tensor] | None = None
        if self.cut:
            self._vocabulary = model.config.get_text_config(decoder=True).vocab_size
            self._product = self.head_module.forward
            self.head_module.forward = self._in_place_of_the_head

    @property
    def cut(self) -> bool:
        """Whether logits are made in chunks."""
        return self.whole_since is None

    def __call__(
        self,
        forward: Callable,  # the model's, or of an engine around it
        read: Read,
        input_ids: torch.Tensor,  # (batch, window) int64
        **inputs,
    ):
        """(the model's output, what ``read`` returned)."""
        if not self.cut:
            output = forward(input_ids=input_ids, **inputs)
            return output, read(output.logits, _whole(output.logits))
        self._read = lambda states: read(states, self.head)
        try:
            output = forward(input_ids=input_ids, **inputs)
        finally:
            self._read = None
        return output, output.logits

    @property
    def head(self) -> Head:
        """The head by itself. Under ZeRO-3 its weight is whole while a ``read`` goes on."""
        return Head(self._product, self._vocabulary, [p for p in self.head_module.parameters() if p.requires_grad])

    def describe(self) -> str:
        """How logits are computed, for the log."""
        return "in chunks" if self.cut else f"whole, since {self.whole_since}"

    def _in_place_of_the_head(self, states: torch.Tensor) -> torch.Tensor:
        return self._product(states) if self._read is None else self._read(states)


def _why_whole(model: PreTrainedModel) -> str | None:
    """None where the logits of a model are the very memory that its head wrote, untouched since, which a pass of fake
    tensors through a model of its kind shows; else why its whole logits are taken."""
    kind = type(model)
    try:
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # linear layers may be of any kind
        cut = with_fake_tensors(lambda _memory: _is_cut(kind._from_config(config, **_PLAIN)))
    except Exception as error:  # of code that is not ours: it may be anything
        return f"the code of {kind.__name__} cannot be followed without values ({type(error).__name__})"
    return None if cut else f"{kind.__name__} does more than apply its head to its states"


@torch.no_grad()
def _is_cut(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    head.register_forward_hook(lambda _head, states, logits: seen.append((states[0], logits, logits._version)))
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    returned = model.eval()(input_ids=ids, use_cache=False).logits
    if len(seen) != 1:
        return False
    states, logits, version = seen[0]
    same = returned.untyped_storage()._cdata == logits.untyped_storage()._cdata and returned.shape == logits.shape
    untouched = returned.dtype == logits.dtype and returned._version == version
    return same and untouched and states.shape[:-1] == ids.shape


def _whole(logits: torch.Tensor) -> Head:
    return Head(lambda rows: rows, logits.shape[-1])


def reader_of(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Reader:
    """Reads a model that is not wrapped by an engine, computing in ``dtype``."""
    readout = Readout(model)

    def read_model(input_ids: torch.Tensor, read: Read) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return readout(model, read, input_ids, use_cache=False)[1]

    return read_model

"""A causal LM cut into its decoder blocks and what is around them, so that no two of these need be in memory at once.

What is around the blocks is run with every block replaced by one that hands on what it is given; so the model's own
code says what its blocks are called with (masks, positions), and makes a loss of the states after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from mbdist.convert.aside import Aside, Batches
from mbdist.loss import next_token_loss
from mbdist.model.readout import Readout

# (names of modules and parameters) -> while it is open, they hold their values
Hold = Callable[[list[str]], AbstractContextManager]


def in_memory(parts: list[str]) -> AbstractContextManager:
    """The ``Hold`` of a model that is in memory anyway."""
    return nullcontext()


def block_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the decoder blocks: the children of the module list that holds most of the layers."""
    best: list[str] = []
    held = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(layer.startswith(f"{name}.") for layer in layers)
            if inside > held:
                best, held = [f"{name}.{i}" for i in range(len(module))], inside
    return best


def layers_by_block(model: nn.Module, layers: Iterable[str]) -> dict[str | None, list[str]]:
    """Names of the layers by block, in model order; those outside of any block come last, under None."""
    blocks = block_names(model, layers)
    groups: dict[str | None, list[str]] = {block: [] for block in (*blocks, None)}
    for name in layers:
        groups[next((block for block in blocks if name.startswith(f"{block}.")), None)].append(name)
    return groups


def computing_in(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@dataclass
class _Call:
    """What the model calls one block with on one batch, besides the hidden states."""

    arguments: tuple
    keywords: dict


class ModelBlocks:
    """The blocks of a model, what it calls them with on every batch, and the states before the first (put aside)."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Iterable[str],  # to convert
        batches: Sequence[torch.Tensor],  # (batch, window) int64 token ids
        dtype: torch.dtype,  # of the passes through the model
        aside: Aside,
        hold: Hold = in_memory,
        between: Callable[[], None] = lambda: None,  # called before every pass of a batch; may raise, to stop there
    ):
        self.model = model
        self.batches = batches
        self.dtype = dtype
        self.aside = aside
        self.hold = hold
        self.between = between
        self.layers_of = layers_by_block(model, layers)
        self.outside = self.layers_of.pop(None)
        self.names = list(self.layers_of)
        self.embedded = Batches(aside, "embedded", len(batches))
        self._calls: list[list[_Call]] = [[] for _ in self.names]
        self._readout = Readout(model)
        self._in_tuples: bool | None = None  # whether blocks return their states as the first of several things
        if self.names:
            self._record()

    def __len__(self) -> int:
        return len(self.names)

    def call(self, block: int, batch: int, states: torch.Tensor) -> torch.Tensor:
        """(batch, window, d) before a block -> after it. The block is to be held."""
        self.between()
        call = self._calls[block][batch]
        with computing_in(self.dtype):
            output = self.model.get_submodule(self.names[block])(states, *call.arguments, **call.keywords)
        return output[0] if isinstance(output, tuple) else output

    def around(
        self,
        batch: int,
        last: torch.Tensor,  # (batch, window, d) after the last block
        embedded: torch.Tensor | None = None,  # (batch, window, embedding's d); None where it does not matter
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(next-token loss, states before the first block) of one batch. What is around the blocks is to be held; the
        input embeddings need not be."""
        self.between()
        ids = self.batches[batch]
        if embedded is None:
            embedded = torch.zeros(*ids.shape, self.model.get_input_embeddings().embedding_dim)
        first: list[torch.Tensor] = []

        def instead(block: int, states: torch.Tensor, _call: _Call) -> torch.Tensor:
            if block == 0:
                first.append(states)
            return last if block == len(self) - 1 else states

        def forward(input_ids: torch.Tensor, **inputs):  # whose embeddings are given
            return self.model(inputs_embeds=embedded, **inputs)

        with self._blocks_replaced(instead), computing_in(self.dtype):
            loss = next_token_loss(self._readout, forward, ids)
        return loss, first[0] if first else None

    def parameters_around(self, input_embeddings: bool = True, head: bool = True) -> list[str]:
        """Names of the parameters outside of the blocks."""
        left_out: set[int] = set()
        embeddings, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for wanted, module, other in ((input_embeddings, embeddings, output), (head, output, embeddings)):
            if not wanted and module is not None:
                tied = {id(parameter) for parameter in other.parameters()} if other is not None else set()
                left_out |= {id(parameter) for parameter in module.parameters()} - tied
        inside = tuple(f"{block}." for block in self.names)
        return [
            name
            for name, parameter in self.model.named_parameters()
            if not name.startswith(inside) and id(parameter) not in left_out
        ]

    @torch.no_grad()
    def _record(self) -> None:
        batch = 0

        def instead(block: int, states: torch.Tensor, call: _Call) -> torch.Tensor:
            self._calls[block].append(call)
            if block == 0:
                self.embedded.put(batch, states)
            return states

        with self.hold(self.parameters_around(head=False)), self._blocks_replaced(instead), computing_in(self.dtype):
            for batch, ids in enumerate(self.batches):  # noqa: B007 (`instead` reads it)
                self.model.base_model(ids, use_cache=False)

    @contextmanager
    def _blocks_replaced(self, instead: Callable[[int, torch.Tensor, _Call], torch.Tensor]) -> Iterator[None]:
        modules = [self.model.get_submodule(name) for name in self.names]

        def replacement(block: int) -> Callable:
            original = modules[block].forward

            def forward(*arguments, **keywords):
                others = dict(keywords)
                states = others.pop("hidden_states", None)
                call = _Call(arguments, others)
                if states is None:
                    states, *rest = arguments
                    call = _Call(tuple(rest), others)
                if self._in_tuples is None:  # the first block runs once, which shows what blocks return
                    with self.hold([self.names[block]]):
                        self._in_tuples = isinstance(original(*arguments, **keywords), tuple)
                states = instead(block, states, call)
                return (states,) if self._in_tuples else states

            return forward

        try:
            for block, module in enumerate(modules):
                module.forward = replacement(block)
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)

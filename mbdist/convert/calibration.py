"""What the calibrated initialisation knows of the layers of one block: X^T X, and states before and after it.

The walk goes through the model block by block, over all tokens, so only one block and its X^T X are in memory; the
hidden states between two blocks are put aside. Two streams of them are followed where they are needed: those of the
float model, and those that the blocks converted so far make of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch

from mbdist.convert.aside import Batches
from mbdist.convert.blocks import ModelBlocks, computing_in
from mbdist.model.layers import linear_shape

_Name = TypeVar("_Name")


@dataclass
class BlockCalibration:
    """One decoder block, still in floating point, and what is known of it when its turn to be converted comes."""

    name: str | None  # None: layers outside of the blocks
    layers: list[str]  # names of those to convert
    grams: dict[str, torch.Tensor]  # of each: X^T X (n, n) fp32
    inputs: Sequence[torch.Tensor] = ()  # of every batch: the converted model's states before it
    targets: Sequence[torch.Tensor] = ()  # the float model's states after it
    forward: Callable[[int, torch.Tensor], torch.Tensor] | None = None  # (number of a batch, states before) -> after
    run: Callable[[], Batches] | None = None

    @cached_property
    def outputs(self) -> Sequence[torch.Tensor]:
        """What the block makes of ``inputs``, computed once: to be asked for when it is converted, not before."""
        return self.run()


def sharing_inputs(grams: dict[_Name, torch.Tensor]) -> list[list[_Name]]:
    """Names of layers, those together that were called with the same inputs: they have one X^T X."""
    sharing: dict[int, list[_Name]] = {}
    for name, gram in grams.items():
        sharing.setdefault(id(gram), []).append(name)
    return list(sharing.values())


class BlockWalk:
    """Iterates over the blocks, in model order. The caller converts a block before it asks for the next one.

    ``sequential``: X^T X is that of the converted stream. ``follow_both``: ``inputs`` and ``targets`` are given.
    Layers outside of any block come last, without states. ``finished``: blocks that an earlier walk, which was killed,
    saw converted (and whose ``outputs`` it asked for where it follows them); this one goes on behind them.
    """

    def __init__(
        self,
        blocks: ModelBlocks,
        sequential: bool = False,
        follow_both: bool = False,
        finished: Container[str] = (),
    ):
        self.blocks = blocks
        self.sequential = sequential
        self.follow_both = follow_both
        self.finished = finished

    @property
    def follows_converted(self) -> bool:
        """Whether later blocks see what the converted ones put out."""
        return self.sequential or self.follow_both

    @torch.no_grad()
    def __iter__(self) -> Iterator[BlockCalibration]:
        blocks, layers = self.blocks, list(self.blocks.layers_of.values())
        needed = max((i for i, names in enumerate(layers) if names), default=-1) + 1
        needed = len(blocks) if blocks.outside else needed
        for number in range(self._first(), needed):
            found = self._enter(number)
            if found.layers:
                yield found
            if self.follows_converted:
                _ = found.outputs
            for stream in self._streams(number):
                if number:
                    stream.drop()
        if blocks.outside:
            grams = self._grams_of(blocks.outside, partial(self._run_around, self._streams(needed)[-1]))
            yield BlockCalibration(None, blocks.outside, grams)
        for stream in self._streams(needed):
            if needed:
                stream.drop()

    def _streams(self, number: int) -> list[Batches]:
        """The states before a block that are followed: of the float model, of the converted one, or both."""
        names = ["float"] * (self.follow_both or not self.sequential) + ["converted"] * self.follows_converted
        length = len(self.blocks.batches)
        return [
            Batches(self.blocks.aside, f"{name}-{number}", length) if number else self.blocks.embedded for name in names
        ]

    def _first(self) -> int:
        """The last block that all states are there for, and that none unfinished comes before."""
        start = 0
        for number, names in enumerate(self.blocks.layers_of.values()):
            if names and self.blocks.names[number] not in self.finished:
                break
            if all(stream.complete for stream in self._streams(number + 1)):
                start = number + 1
        return start

    def _enter(self, number: int) -> BlockCalibration:
        name = self.blocks.names[number]
        names = self.blocks.layers_of[name]
        before, after = self._streams(number), self._streams(number + 1)
        inputs = before[-1]
        with self.blocks.hold([name]):
            if self.sequential:
                if names:
                    grams = self._grams_of(names, lambda: self._run(number, inputs))
                if self.follow_both:
                    self._run(number, before[0], after[0])
            elif names:
                grams = self._grams_of(names, lambda: self._run(number, before[0], after[0]))
            else:
                self._run(number, before[0], after[0])
        return BlockCalibration(
            name,
            names,
            grams if names else {},
            inputs,
            after[0],
            partial(self.blocks.call, number),
            partial(self._run_held, number, inputs, after[-1]),
        )

    def _run(self, number: int, before: Batches, after: Batches | None = None) -> None:
        for batch, states in enumerate(before):
            states = self.blocks.call(number, batch, states)
            if after is not None:
                after.put(batch, states)

    def _run_held(self, number: int, before: Batches, after: Batches) -> Batches:
        with torch.no_grad(), self.blocks.hold([self.blocks.names[number]]):
            self._run(number, before, after)
        return after

    def _run_around(self, states: Batches) -> None:
        blocks = self.blocks
        with blocks.hold(blocks.parameters_around()):
            for batch, ids in enumerate(blocks.batches):
                last = states[batch] if len(blocks) else torch.empty(0)
                blocks.around(batch, last, blocks.model.get_input_embeddings()(ids))

    def _grams_of(self, names: list[str], run: Callable[[], None]) -> dict[str, torch.Tensor]:
        """X^T X by layer while ``run`` runs. Layers called with one tensor, as queries, keys and values are, share
        one."""
        grams: dict[str, torch.Tensor] = {}
        sums: dict[str, torch.Tensor] = {}  # by the first of the layers that share it
        seen: tuple[torch.Tensor | None, str] = (None, "")

        def before_forward(name: str):
            def hook(_layer, inputs):
                nonlocal seen
                if inputs[0] is not seen[0]:
                    seen = (inputs[0], name)
                    x = inputs[0].flatten(0, -2).float()
                    if name not in sums:
                        sums[name] = torch.zeros(x.shape[1], x.shape[1])
                    with torch.autocast("cpu", enabled=False):
                        sums[name].addmm_(x.T, x)
                grams[name] = sums[seen[1]]

            return hook

        with ExitStack() as hooks:
            for name in names:
                layer = self.blocks.model.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(before_forward(name)).remove)
            with computing_in(self.blocks.dtype):
                run()
        for name in set(names) - set(grams):  # a layer that no token reached, an expert say
            n = linear_shape(self.blocks.model.get_submodule(name))[1]
            grams[name] = torch.zeros(n, n)
        return {name: grams[name] for name in names}

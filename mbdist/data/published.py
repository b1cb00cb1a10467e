"""The windows on which published tables measure perplexity, prepared as GPTQ's scripts do (arXiv 2210.17323).

Our own windows join documents by the end-of-text token. Published WikiText-2 and C4 columns do not, and a perplexity is
comparable with them only on the same windows (usually of 2,048 tokens) cut from the same joined text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from mbdist.data.sources import Document
from mbdist.errors import UserError

_C4_WINDOWS = 256


def wikitext2_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, window: int
) -> list[Sequence[int]]:
    """The whole split as one text, its rows joined by blank lines, cut into windows. A document is a row of the data
    set, or a whole raw file, whose lines are the rows."""
    rows = [row for document in documents for row in _rows(str(document))]
    ids = tokenizer("\n\n".join(rows), verbose=False)["input_ids"]
    return [ids[first : first + window] for first in range(0, len(ids) - window + 1, window)]


def c4_windows(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, window: int) -> list[Sequence[int]]:
    """256 windows, each at a random place of a random document that is long enough, seed 0."""
    draw = random.Random(0)
    tokens: dict[int, list[int]] = {}
    windows: list[Sequence[int]] = []
    too_short: set[int] = set()
    while len(windows) < _C4_WINDOWS:
        number = draw.randint(0, len(documents) - 1)
        if number not in tokens:
            tokens[number] = tokenizer(str(documents[number]), verbose=False)["input_ids"]
        ids = tokens[number]
        if len(ids) <= window:
            too_short.add(number)
            if len(too_short) == len(documents):
                raise UserError(f"no document holds more than {window} tokens: give longer ones or a smaller --window")
            continue
        first = draw.randint(0, len(ids) - window - 1)
        windows.append(ids[first : first + window])
    return windows


PREPARATIONS: dict[str, Callable[[Sequence[Document], PreTrainedTokenizerBase, int], list[Sequence[int]]]] = {
    "wikitext2": wikitext2_windows,
    "c4": c4_windows,
}


def published_windows(
    preparation: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, window: int
) -> datasets.Dataset:
    """Windows by one of ``PREPARATIONS``; every token is learned."""
    windows = PREPARATIONS[preparation](documents, tokenizer, window)
    if not windows:
        raise UserError(f"the text fills no window of {window} tokens: give more of it or a smaller --window")
    ids = np.asarray(windows, np.int32)
    return datasets.Dataset.from_dict({"input_ids": ids, "learned": np.ones(ids.shape, bool)}).with_format("torch")


def _rows(document: str) -> list[str]:
    """Rows as the data set has them: a blank line is an empty row, others keep their line end."""
    if "\n" not in document.rstrip("\n"):
        return [document]
    return [line + "\n" if line.strip() else "" for line in document.removesuffix("\n").split("\n")]

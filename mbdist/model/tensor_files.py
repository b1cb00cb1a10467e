"""Ranges of the tensors of a safetensors file. (What the library gives of a range is mapped, and its pages count as
memory while the file is open, or is cut from the whole tensor, read first.)"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: str
    offset: int  # bytes from the file's begin
    shape: list[int]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements [first, first + count), flat; all from ``first`` on without a count."""
        values = torch.empty(self.num_elements - first if count is None else count, dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as content:
            content.seek(self.offset + first * self.dtype.itemsize)
            left = memoryview(values.view(torch.uint8).numpy())
            while left and (read := content.readinto(left)):
                left = left[read:]
        if left:
            raise OSError(f"{self.file} ended before its tensors did")
        return values


def stored_tensors(file: str | Path) -> dict[str, StoredTensor]:
    """By name. Raises SafetensorError where the file is not whole."""
    with safe_open(file, framework="pt") as checked, open(file, "rb") as content:
        begin = 8 + int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(begin - 8))
        found = {}
        for name in checked.keys():  # noqa: SIM118  (a method of safetensors, not a dict)
            shape, (first, _) = header[name]["shape"], header[name]["data_offsets"]
            dtype = (checked.get_slice(name)[:0] if shape else checked.get_tensor(name)).dtype
            found[name] = StoredTensor(str(file), begin + first, shape, dtype)
    return found

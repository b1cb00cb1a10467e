"""Tensors of a conversion that are put aside in files: what one step leaves for the next, also after a kill between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mbdist.whole_files import clear_disk_errors


class Aside:
    """Named dictionaries of tensors in a folder; a name is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        written = self.folder / f"{name}.tmp"
        with clear_disk_errors(self.folder):
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, written)
            written.rename(self._file(name))

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """In memory of their own: sums of a BLAS depend on where in a mapped file a tensor begins."""
        return {key: tensor.clone() for key, tensor in load_file(self._file(name)).items()}

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def drop(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Batches(Sequence[torch.Tensor]):
    """One tensor a batch, one in memory at a time."""

    def __init__(self, aside: Aside, name: str, length: int):
        self.aside, self.name, self.length = aside, name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> torch.Tensor:
        if not 0 <= number < self.length:
            raise IndexError(number)
        return self.aside.load(self._of(number))["batch"]

    def put(self, number: int, tensor: torch.Tensor) -> None:
        self.aside.save(self._of(number), {"batch": tensor})

    @property
    def complete(self) -> bool:
        return all(self.aside.has(self._of(number)) for number in range(self.length))

    def drop(self) -> None:
        for number in range(self.length):
            self.aside.drop(self._of(number))

    def _of(self, number: int) -> str:
        return f"{self.name}-{number:05d}"

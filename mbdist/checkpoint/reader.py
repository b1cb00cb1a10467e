"""Reading a checkpoint, whoever wrote it: by name and range of elements."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from mbdist.errors import UserError
from mbdist.model.tensor_files import StoredTensor, stored_tensors

FORMAT = 2
STATE, COMPLETE = "state.json", "complete"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those of a run, oldest first. A folder that was not written to its end does not count."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in found if (path / COMPLETE).is_file()), key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The one to resume from, if there is any."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def remove_checkpoint(folder: Path) -> None:
    (folder / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted is not complete
    shutil.rmtree(folder, ignore_errors=True)


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_state(folder: Path) -> dict:
    """What the ranks shared. Raises UserError where the checkpoint is not whole or is of another format."""
    if not (folder / COMPLETE).is_file():
        raise UserError(f"{folder} is no complete checkpoint: it has no file named {COMPLETE}")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, STATE, error) from error
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {state.get('format')}, and this version of mbdist reads "
            f"format {FORMAT}: resume with the version that wrote it"
        )
    return state


def _damaged(folder: Path, file: str, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged: {file}: {error}. Remove the folder to resume from the one before, or "
        "set checkpoint.resume to another"
    )


class Checkpoint:
    """An opened checkpoint. Raises UserError where it is not whole, was altered, or is of another format."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1):
        """Hashes every ``world_size``-th shard from ``rank`` on, so that all ranks together see all content."""
        self.folder = folder
        self.state = read_state(folder)
        self._pieces: dict[str, list[tuple[int, StoredTensor]]] = defaultdict(list)  # name: (first element, where)
        for number, note in enumerate(self.state["shards"]):
            self._open(note, verify=number % world_size == rank)

    def _open(self, note: dict, verify: bool) -> None:
        path = self.folder / note["file"]
        try:
            if path.stat().st_size != note["bytes"]:
                raise ValueError(f"it has {path.stat().st_size} bytes, {note['bytes']} were written")
            if verify and digest_of(path) != note["sha256"]:
                raise ValueError("its content is not what was written")
            stored = stored_tensors(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise _damaged(self.folder, note["file"], error) from error
        for key, tensor in stored.items():
            name, first = key.rsplit("@", 1)
            self._pieces[name].append((int(first), tensor))

    @property
    def step(self) -> int:
        """Optimizer steps that had been taken."""
        return self.state["step"]

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def pieces(self, name: str) -> list[torch.Tensor]:
        """All ranges of a tensor, by their first element."""
        return [piece.read() for _, piece in sorted(self._pieces.get(name, []))]

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements [first, first + count) of a flat tensor. Raises UserError where they were not saved."""
        parts, reached, end = [], first, first + count
        for start, piece in sorted(self._pieces.get(name, [])):
            stop = start + piece.num_elements
            if start <= reached < stop:
                parts.append(piece.read(reached - start, min(end, stop) - reached))
                reached = min(end, stop)
            if reached == end:
                break
        if reached < end:
            raise UserError(f"the checkpoint {self.folder} has no elements {reached} to {end} of {name}")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of ``like``."""
        return self.read(name, 0, like.numel()).view(like.shape)

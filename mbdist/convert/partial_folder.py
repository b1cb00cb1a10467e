"""The output of a conversion that is not complete: a folder beside it, which takes its name at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mbdist.errors import UserError
from mbdist.file_lock import take_lock
from mbdist.whole_files import clear_disk_errors, fsync, put_in_place, write_whole


def partial_folder_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


class PartialFolder:
    """Finished safetensors files ("shards") stay where a conversion ends early, for the same conversion to go on from.

    ``key`` says what the output depends on. Raises UserError where the folder is another conversion's (``replace``:
    that one is thrown away) or where another process is at it.
    """

    def __init__(self, output: Path, key: dict[str, object], num_shards: int, replace: bool = False):
        self.output = output
        self.folder = partial_folder_of(output)
        self.num_shards = num_shards
        self._lock = contextlib.ExitStack()
        with clear_disk_errors(output):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._take_up(json.loads(json.dumps(key)), replace)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, *_error) -> None:
        self._lock.close()

    @property
    def scratch(self) -> Path:
        """For what is not part of the output."""
        return self.folder / "scratch"

    def has(self, number: int) -> bool:
        return self._shard(number).is_file()

    def reports(self, number: int) -> list[dict]:
        """What was noted with a shard."""
        return json.loads(self._report(number).read_text())

    def write(self, number: int, tensors: dict[str, torch.Tensor], reports: list[dict]) -> None:
        """Write a shard; only whole ones get their name."""
        with clear_disk_errors(self.output):
            self._report(number).write_text(json.dumps(reports))
            written = self.scratch / "shard.tmp"
            save_file(tensors, written, metadata={"format": "pt"})
            fsync(written)
            written.rename(self._shard(number))

    def remembered(self, name: str, compute: Callable[[], dict]) -> dict:
        """What ``compute`` said when it was first asked."""
        file = self.scratch / f"{name}.json"
        if not file.is_file():
            found = compute()
            with clear_disk_errors(self.output):
                write_whole(file, json.dumps(found).encode())
        return json.loads(file.read_text())

    def finish(self, save_rest: Callable[[Path], None]) -> None:
        """All shards are there: add what is beside them, and put the folder in its place."""
        with clear_disk_errors(self.output):
            places, total = {}, 0
            for number in range(self.num_shards):
                shard = self._shard(number)
                with safe_open(shard, framework="pt") as opened:
                    places |= dict.fromkeys(opened.keys(), shard.name)
                total += shard.stat().st_size
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
            save_rest(self.folder)
            for left in self.scratch.iterdir():  # what is large; after a kill here, the notes beside are wanted again
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.suffix != ".json":
                    left.unlink()
            put_in_place(self.folder, self.output)
            shutil.rmtree(self.output / self.scratch.name)
            (self.output / self._key.name).unlink()
            (self.output / "lock").unlink()

    @property
    def _key(self) -> Path:
        return self.folder / "conversion.json"

    def _shard(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def _report(self, number: int) -> Path:
        return self.scratch / f"reports-{number}.json"

    def _take_lock(self) -> None:
        lock = take_lock(self.folder / "lock")
        if lock is None:
            raise UserError(f"another process is converting to {self.output} now; wait for it or end it")
        self._lock.enter_context(lock)

    def _take_up(self, key: dict, replace: bool) -> None:
        before = json.loads(self._key.read_text()) if self._key.is_file() else None
        changed = [name for name in key if before is not None and before.get(name) != key[name]]
        if changed and not replace:
            self._lock.close()
            raise UserError(
                f"{self.folder} holds an unfinished conversion with other settings ({', '.join(changed)}): give the "
                f"command that began it to finish it, or remove the folder to begin anew"
            )
        if before is None or changed:
            for left in self.folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != "lock":
                    left.unlink()
            self.scratch.mkdir()
            write_whole(self._key, json.dumps(key).encode())

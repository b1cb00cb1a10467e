"""Writing a checkpoint while training goes on.

    checkpoints/step_40/state.json            what all ranks share, and the size and digest of every shard
    checkpoints/step_40/shard_0.safetensors   pieces of tensors: "<name>@<first element>", flat
    checkpoints/step_40/complete              the last thing that is written

A tensor is stored under its logical name with its unsharded coordinates, cut into ranges wherever its owners' parts
end, so that any number of ranks can read it. Rank 0 looks whether there is room and makes ``step_40.tmp-<attempt>``.
Every rank snapshots its pieces, and a thread writes them into that; the thread of rank 0 sees by files when all shards
are there, and renames the folder. No collective runs beside training, and nobody reads a folder without ``complete``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from mbdist.checkpoint.reader import COMPLETE, FORMAT, STATE, complete_checkpoints, digest_of, remove_checkpoint
from mbdist.comm.communicator import Communicator
from mbdist.config.checkpoint import CheckpointConfig
from mbdist.whole_files import fsync, write_whole

_PARTIAL = ".tmp-"
_POLL_S = 0.05


class Piece(NamedTuple):
    """A range of a tensor."""

    name: str
    first: int  # element of the flat whole tensor
    values: torch.Tensor


class CheckpointWriter:
    """One rank's part in every checkpoint of a run."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        communicator: Communicator,
        report: Callable[..., None],  # takes an event and its values, as ``MetricsWriter.write`` does
    ):
        self.folder = folder
        self.config = config
        self.communicator = communicator
        # What a rank still writes that was thought lost must not get among the shards of the next attempt.
        self._attempt = communicator.all_gather_objects(uuid.uuid4().hex[:8], "checkpoint")[0]
        self._report = report
        self._thread: threading.Thread | None = None
        self._last_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after so many steps, as rank 0 sees it: it tells the others."""
        by_steps = self.config.every_steps is not None and step > 0 and step % self.config.every_steps == 0
        waited_s = time.monotonic() - self._last_s
        by_time = self.config.every_minutes is not None and waited_s >= 60 * self.config.every_minutes
        return by_steps or by_time

    def save(self, step: int, pieces: list[Piece], state: dict) -> bool:
        """Write the state after ``step`` steps, where there is room for it: snapshot now, files later. All ranks call
        it together. ``state``: JSON, the same on all of them. Returns whether it was begun."""
        started = time.monotonic()
        self.wait()
        final = self.folder / f"step_{step}"
        partial = final.with_name(f"{final.name}{_PARTIAL}{self._attempt}")
        of_ranks = self.communicator.all_gather_objects(sum(piece.values.nbytes for piece in pieces), "checkpoint")
        begun = self.communicator.rank > 0 or self._begin(step, partial, sum(of_ranks))
        if begun := self.communicator.all_gather_objects(begun, "checkpoint")[0]:
            tensors = {f"{name}@{first}": _snapshot(values) for name, first, values in pieces}
            blocked_s = time.monotonic() - started
            work = (step, partial, final, tensors, state, blocked_s)
            self._thread = threading.Thread(target=self._write, args=work, daemon=False)
            self._thread.start()
        self._last_s = time.monotonic()
        return begun

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _failed(self, step: int, why: str) -> None:
        self._report("checkpoint_failed", step=step, why=f"{why}; the run goes on, the checkpoint before it stays")

    def _begin(self, step: int, partial: Path, num_bytes: int) -> bool:
        """Make the folder, if there is room. No rank writes at this moment: what is half written will stay so."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"step_*{_PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < num_bytes:
                raise OSError(f"{free / 1e9:.2f} GB are free, about {num_bytes / 1e9:.2f} GB are needed")
            partial.mkdir()
        except OSError as error:
            self._failed(step, f"cannot begin in {self.folder}: {error}")
            return False
        return True

    def _write(
        self, step: int, partial: Path, final: Path, tensors: dict[str, torch.Tensor], state: dict, blocked_s: float
    ) -> None:
        _give_way()
        started, rank = time.monotonic(), self.communicator.rank
        try:
            shard = partial / f"shard_{rank}.safetensors"
            save_file(tensors, shard)
            fsync(shard)
            note = {"file": shard.name, "bytes": shard.stat().st_size, "sha256": digest_of(shard)}
            write_whole(partial / f"shard_{rank}.json", json.dumps(note).encode())
            if rank == 0:
                self._publish(partial, final, state)
                seconds = {"seconds": round(time.monotonic() - started, 3), "blocked_s": round(blocked_s, 3)}
                self._report("checkpoint", step=step, folder=str(final), **seconds)
        except Exception as error:  # a full disk above all, in a class of safetensors' own: the run must go on
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                self._failed(step, f"cannot write {final}: {error}")
                return
            print(f"cannot write shard {rank} of {final}: {error}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):  # rank 0 gives up later then, or has already
                (partial / f"shard_{rank}.safetensors").unlink(missing_ok=True)  # makes room for the next line
                write_whole(partial / f"shard_{rank}.json", json.dumps({"error": f"worker {rank}: {error}"}).encode())

    def _publish(self, partial: Path, final: Path, state: dict) -> None:
        notes = [partial / f"shard_{rank}.json" for rank in range(self.communicator.world_size)]
        patience_s = 0.8 * self.communicator.timeout_s  # the next save waits for this one, and others for rank 0 in it
        deadline = time.monotonic() + patience_s
        while not all(note.exists() for note in notes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all workers wrote their shards in {patience_s:g} s")
            time.sleep(_POLL_S)
        shards = [json.loads(note.read_text()) for note in notes]
        if errors := [shard["error"] for shard in shards if "error" in shard]:
            raise OSError("; ".join(errors))
        write_whole(partial / STATE, json.dumps({"format": FORMAT, "shards": shards, **state}).encode())
        for note in notes:
            note.unlink()
        remove_checkpoint(final)  # of an attempt that got further, before it was lost
        partial.rename(final)
        fsync(final.parent)
        (final / COMPLETE).touch()
        fsync(final)
        self._prune()

    def _prune(self) -> None:
        found = complete_checkpoints(self.folder)
        kept = set(found[-self.config.keep_last :])
        if self.config.keep_best:
            perplexity = {each: json.loads((each / STATE).read_text())["perplexity"] for each in found}
            measured = [each for each in found if perplexity[each] is not None]
            kept |= set(sorted(measured, key=perplexity.__getitem__)[: self.config.keep_best])
        for old in set(found) - kept:
            remove_checkpoint(old)


def _snapshot(values: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that training does not reach."""
    flat = values.detach().reshape(-1)
    return flat.clone() if flat.device.type == "cpu" else flat.cpu()


def _give_way() -> None:
    """Have this thread compute only where the step leaves a core to it. Linux has a priority a thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)

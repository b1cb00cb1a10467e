"""Checkpoints of a run: state in logical coordinates, written in the background, resumed by any number of workers."""

from mbdist.checkpoint.reader import Checkpoint, complete_checkpoints, latest_checkpoint, read_state, remove_checkpoint
from mbdist.checkpoint.resume import changed_settings, check_inputs
from mbdist.checkpoint.writer import CheckpointWriter, Piece

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Piece",
    "changed_settings",
    "check_inputs",
    "complete_checkpoints",
    "latest_checkpoint",
    "read_state",
    "remove_checkpoint",
]

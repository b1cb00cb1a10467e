"""Checkpoints of a run: state in logical coordinates, written in the background, resumed by any number of workers."""

from mbdist.checkpoint.reader import Checkpoint, complete_checkpoints, latest_checkpoint, remove_checkpoint
from mbdist.checkpoint.resume import check_resumable
from mbdist.checkpoint.weights import ResumedWeights
from mbdist.checkpoint.writer import CheckpointWriter, Piece

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Piece",
    "ResumedWeights",
    "check_resumable",
    "complete_checkpoints",
    "latest_checkpoint",
    "remove_checkpoint",
]

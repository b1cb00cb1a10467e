"""What may differ between the run that wrote a checkpoint and the one that resumes it."""

from __future__ import annotations

from mbdist.checkpoint.reader import Checkpoint
from mbdist.config.schema import RunConfig
from mbdist.errors import UserError

# Another value here would make the saved state that of another computation.
_FIXED = {
    "seed": None,
    "model": None,
    "convert": None,
    "data": ("train", "window", "eval", "eval_fraction"),
    "train": ("sequences_per_step",),
    "boolean": ("planes", "accumulator", "signal", "alternate_every"),
    "floats": ("also_train",),
}


def check_resumable(checkpoint: Checkpoint, config: RunConfig, prepared: str) -> dict[str, str]:
    """Settings that the resumed run has changed, {key: "old -> new"}. Raises UserError for one that it may not."""
    before, now = _flat(checkpoint.state["config"]), _flat(config.model_dump(mode="json"))
    changed = {
        key: f"{before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "run_dir"
    }
    forbidden = [f"{key}: {change}" for key, change in changed.items() if _is_fixed(key)]
    if forbidden:
        raise UserError(
            f"the checkpoint {checkpoint.folder} is of a run with other settings:\n  "
            + "\n  ".join(forbidden)
            + "\nSet them back, or start anew: another run_dir, or checkpoint.resume=none (removes the checkpoints)"
        )
    if checkpoint.state["prepared"] != prepared:
        raise UserError(
            f"the files of the model {config.model.path} are not those that {checkpoint.folder} was made with: put "
            "them back, or start anew with checkpoint.resume=none"
        )
    return changed


def _is_fixed(key: str) -> bool:
    section, _, setting = key.partition(".")
    return section in _FIXED and (_FIXED[section] is None or setting.split(".")[0] in _FIXED[section])


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

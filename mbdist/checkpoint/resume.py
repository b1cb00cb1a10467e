"""What may differ between the run that wrote a checkpoint and the one that resumes it."""

from __future__ import annotations

from pathlib import Path

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

_INPUTS = {
    "model": "the files of the model (model.path) are not those: put them back",
    "data.train": "the training text (data.train) is another, or is cut into other tokens: put it back",
    "weights": "training started from other weights: put that run's converted and prepared.json into run_dir (another "
    "machine, or number of threads, may convert to other bits)",
}


def changed_settings(folder: Path, state: dict, config: RunConfig) -> dict[str, str]:
    """Settings that a run changes which goes on from the checkpoint, {key: "old -> new"}. Raises UserError for those
    that it may not."""
    before, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    changed = {
        key: f"{before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "run_dir"
    }
    forbidden = [f"{key}: {change}" for key, change in changed.items() if _is_fixed(key)]
    if forbidden:
        raise UserError(
            f"the checkpoint {folder} is of a run with other settings:\n  "
            + "\n  ".join(forbidden)
            + "\nSet them back, or start anew: another run_dir, or checkpoint.resume=none (removes the checkpoints)"
        )
    return changed


def check_inputs(folder: Path, state: dict, digests: dict[str, str]) -> None:
    """Raises UserError where what the run reads has another digest than when the checkpoint was made."""
    for name, digest in digests.items():
        if state["inputs"][name] != digest:
            raise UserError(
                f"the checkpoint {folder} was made with something else: {_INPUTS[name]}. Or start anew: another "
                "run_dir, or checkpoint.resume=none (removes the checkpoints)"
            )


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

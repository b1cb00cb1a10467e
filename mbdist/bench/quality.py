"""``mbdist bench quality``: what a bit buys, before and after finetuning, beside the methods that people use today.

Every row is one measurement in a process of its own: train and calibrate on one text, report on another. Rows land in
the result file as they are done, with a key of the settings they depend on, so a run that was cut off goes on where it
stopped, and a change of a setting repeats only rows of the sections that it is in. Models and texts count by their
paths, and what the code computes is not looked at: where these change, start a new file in a new ``run_dir``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from mbdist.bench.process import in_own_process
from mbdist.bench.quality_report import as_table
from mbdist.bench.quality_rows import (
    compute_type,
    digest_of,
    make_gpt2,
    measure_adapted_run,
    measure_finetuned_float,
    measure_float,
    measure_gptq,
    measure_round_to_nearest,
    measure_run,
    measure_straight_through,
)
from mbdist.config import RunConfig, load_config, with_changes

_FORMAT = 1  # of a row; part of its key
_PAPER = Path(__file__).parents[2] / "configs" / "paper.yaml"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    measure: Callable[..., dict]
    changes: dict = field(default_factory=dict)  # to the base config, as {"section.key": value}
    arguments: tuple = ()
    make_model: Callable[[RunConfig, Path], dict] | None = None  # in the folder that it names, unless that is there

    def depends_on(self, config: RunConfig) -> list:
        """What its result depends on; nothing of the optimizers and the loss where nothing is trained."""
        sections = ["seed", "model", "convert", "data"]
        codec = None
        if self.measure not in _NOT_TRAINED and config.train.steps > 0:
            sections += ["boolean", "floats", "loss"]
            codec = config.comm.codec
        if self.measure is measure_float:
            sections.remove("convert")
        settings = config.model_dump(include=dict.fromkeys(sections, True) | {"train": _STEPS})
        return [_FORMAT, self.group, self.name, self.arguments, codec, settings]


_STEPS = {"steps", "sequences_per_step", "micro_batch", "max_grad_norm", "precision"}  # of `train`, what decides a row
# Windows of the evaluation text, where rows are compared with each other alone.
_CONVERSION_WINDOWS = 128
_ABLATION_WINDOWS = 64
_TEN_BLOCKS = ["*.[0-9].*"]  # of a model's blocks, whatever it calls them
_NOT_TRAINED = (measure_float, measure_round_to_nearest, measure_gptq)

_NO_FINETUNING = {"train.steps": 0}
_NOT_RECONSTRUCTED = {"convert.reconstruction.steps": 0}
_NO_FLIPS = {"boolean.step_size": 0.0}


def _longer(config: RunConfig) -> dict:
    """Steps of a row without reconstruction, which goes over tokens too."""
    return {"train.steps": config.train.steps + config.convert.reconstruction.steps}


def _half_steps(config: RunConfig) -> dict:
    """Steps of half as many tokens."""
    sequences = config.train.sequences_per_step // 2
    return {"train.sequences_per_step": sequences, "train.micro_batch": min(config.train.micro_batch, sequences)}


def _scales_only(config: RunConfig) -> dict:
    """Without reconstruction, whose tokens scales use better in finetuning."""
    return {**_NOT_RECONSTRUCTED, **_NO_FLIPS, **_longer(config)}


def _architecture_rows(config: RunConfig) -> Iterator[Row]:
    """The defaults on a model of another kind: GPT-2's blocks (LayerNorm, biases, GELU), trained here from scratch."""
    trained_with = [config.model, config.data, config.train, config.floats]
    digest = digest_of([config.seed, *(section.model_dump() for section in trained_with)])
    model = {
        "model.path": str(Path(config.run_dir) / f"gpt2-{digest}"),
        "model.gguf_file": None,
        "floats.also_train": ["*ln_*", "*wte*", "*wpe*"],  # its norms and embeddings
    }

    def row(group: str, name: str, measure: Callable[..., dict], changes: dict) -> Row:
        return Row(group, name, measure, {**model, **changes}, make_model=make_gpt2)

    yield row("other architecture", "float", measure_float, {})
    yield row("other architecture", "calibrated", measure_run, {**_NO_FINETUNING, **_NOT_RECONSTRUCTED})
    yield row("other architecture", "reconstructed", measure_run, _NO_FINETUNING)
    yield row("other architecture, finetuned", "float", measure_finetuned_float, _longer(config))
    yield row("other architecture, finetuned", "scales and bits", measure_run, {})


def _start_rows(_config: RunConfig) -> Iterator[Row]:
    yield Row("start", "float", measure_float)
    for planes in (1, 2, 3, 4):
        at = {"convert.planes": planes, **_NO_FINETUNING}
        for init in ("svid", "joint"):
            yield Row("start", init, measure_run, {**at, "convert.init": init})
        yield Row("start", "calibrated", measure_run, {**at, **_NOT_RECONSTRUCTED})
        yield Row("start", "reconstructed", measure_run, at)
    for bits in (2, 3, 4):
        for group in (128, 64):
            yield Row("start", f"round to nearest, g{group}", measure_round_to_nearest, {}, (bits, group))
            yield Row("start", f"GPTQ, g{group}", measure_gptq, {}, (bits, group))


def _paper() -> dict:
    """The published recipe, as changes."""
    paper = load_config(str(_PAPER), [])
    sections = {name: getattr(paper, name).model_dump() for name in ("boolean", "floats", "loss")}
    return {**sections, "convert.init": paper.convert.init}


def _finetuned_rows(config: RunConfig) -> Iterator[Row]:
    longer, paper = _longer(config), _paper()
    yield Row("finetuned", "float", measure_finetuned_float, longer)
    for planes in (2, 3):
        at = {"convert.planes": planes}
        yield Row("finetuned", "scales and bits", measure_run, at)
        yield Row("finetuned", "scales only", measure_run, {**at, **_scales_only(config)})
        yield Row("finetuned", "straight-through latents", measure_straight_through, at)
        yield Row("finetuned", "paper", measure_run, {**at, **paper, **longer})


def _adapted_rows(config: RunConfig) -> Iterator[Row]:
    """What finetuning does to the bits apart from what it teaches about the text: the float model sees the text first,
    is converted then, and teaches. On twice the tokens of the finetuned rows: a quarter for the float model, two fifths
    for the blocks, from which bits learn most, each of them once, the others for the model, in steps of half the
    size."""
    from mbdist.data.calibration import BATCH_TOKENS

    budget = 2 * _longer(config)["train.steps"]  # of whole steps
    half = _half_steps(config)
    before, blocks = budget // 2, 5 * budget // 12
    first = (before,)
    rest = 2 * (budget - blocks) - before
    text = {"convert.calibration_tokens": blocks * BATCH_TOKENS}
    yield Row("finetuned", "float", measure_finetuned_float, {"train.steps": budget})
    for planes in (2, 3):
        bits = {**text, **half, "convert.planes": planes, "convert.reconstruction.steps": blocks, "train.steps": rest}
        yield Row("finetuned", "adapted, mostly blocks, scales and bits", measure_adapted_run, bits, first)
    scales = {**text, **half, **_NOT_RECONSTRUCTED, **_NO_FLIPS, "train.steps": rest + 2 * blocks}
    yield Row("finetuned", "adapted, small steps, scales only", measure_adapted_run, scales, first)


def _conversion_rows(config: RunConfig) -> Iterator[Row]:
    """What conversion can do otherwise, one setting at a time."""
    part = {"data.max_eval_windows": _CONVERSION_WINDOWS, **_NO_FINETUNING}
    few_blocks = {"convert.include": _TEN_BLOCKS, **part}

    def row(name: str, changes: dict) -> Row:
        return Row("ten blocks", name, measure_run, {**few_blocks, **changes})

    def reconstruction(name: str, **settings) -> Row:
        return row(f"reconstruction, {name}", {f"convert.reconstruction.{key}": x for key, x in settings.items()})

    yield Row("ten blocks", "float", measure_float, part)
    yield reconstruction("as configured")
    yield reconstruction("scales only", step_size=0.0)
    for planes in ("last", "all"):
        yield reconstruction(f"planes {planes}", planes=planes)
    configured = config.convert.reconstruction
    for setting, name in (("max_flip_rate", "cap"), ("step_size", "step size")):
        thrice = getattr(configured, setting) * 3
        yield reconstruction(f"{name} {thrice:.2g}", **{setting: thrice})
    for accumulator in ("int4", "fp32"):
        yield reconstruction(f"accumulator {accumulator}", accumulator=accumulator)
    yield row("not reconstructed", _NOT_RECONSTRUCTED)
    yield row("not reconstructed, block after block", {"convert.sequential": True, **_NOT_RECONSTRUCTED})
    yield row("not reconstructed, 8192 tokens", {"convert.calibration_tokens": 8192, **_NOT_RECONSTRUCTED})


def _ablation_rows(config: RunConfig) -> Iterator[Row]:
    """What finetuning can do otherwise, in few small steps: starts by what trains, rules, threshold.
    Rows whose blocks are not reconstructed finetune on those tokens too."""
    steps, blocks = config.train.steps // 2, config.convert.reconstruction.steps // 2
    short = {
        "train.steps": steps,
        "convert.reconstruction.steps": blocks,
        "data.max_eval_windows": _ABLATION_WINDOWS,
        **_half_steps(config),
    }
    longer = {"train.steps": steps + 2 * blocks}

    def row(name: str, changes: dict) -> Row:
        return Row("ablation", name, measure_run, {**short, **changes})

    yield Row("ablation", "float", measure_finetuned_float, {**short, **longer})
    for start, changes in (("calibrated", {**longer, **_NOT_RECONSTRUCTED}), ("reconstructed", {})):
        yield row(f"{start}, scales only", {**changes, **_NO_FLIPS})
        yield row(f"{start}, evidence", changes)
    yield row("reconstructed, evidence of 3 standard errors", {"boolean.step_size": 1 / 3})
    for signal, step_size in (("curvature", 0.05), ("rms", 0.05), ("raw", 5e-3)):
        yield row(f"reconstructed, {signal}", {"boolean.signal": signal, "boolean.step_size": step_size})


def _allocation_rows(config: RunConfig) -> Iterator[Row]:
    """A budget of bits spread over the matrices, beside the same number of planes for all of them."""
    like_two, like_three = (math.ceil(planes * _bits_of_a_plane(config) * 1e4) / 1e4 for planes in (2, 3))
    part = {"data.max_eval_windows": _CONVERSION_WINDOWS, **_NOT_RECONSTRUCTED, **_NO_FINETUNING}
    yield Row("allocation", "float", measure_float, part)
    for planes in (2, 3):
        yield Row("allocation", "the same for all", measure_run, {"convert.planes": planes, **part})
    budgets = {"second_order": (2.0, like_two, 2.5, 3.0, like_three), "residual": (like_two,)}
    for rule, some in budgets.items():
        for bits in some:
            changes = {"convert.bits": bits, "convert.allocation": rule, **part}
            yield Row("allocation", rule.replace("_", "-"), measure_run, changes)


def _bits_of_a_plane(config: RunConfig) -> float:
    """A weight, scales included, over all layers that are converted."""
    from mbdist.convert.allocation import plane_bits
    from mbdist.model.layers import convertible_layers, linear_shape
    from mbdist.model.loading import empty_model

    layers = convertible_layers(empty_model(config.model), config.convert.include, config.convert.exclude)
    shapes = [linear_shape(layer) for layer in layers.values()]
    return sum(map(plane_bits, shapes)) / sum(m * n for m, n in shapes)


GROUPS: dict[str, Callable[[RunConfig], Iterator[Row]]] = {
    "start": _start_rows,
    "finetuned": _finetuned_rows,
    "adapted": _adapted_rows,
    "allocation": _allocation_rows,
    "architecture": _architecture_rows,
    "conversion": _conversion_rows,
    "ablation": _ablation_rows,
}


def bench_quality(config: RunConfig, groups: list[str], json_file: Path) -> list[dict]:
    """Measure what is not in ``json_file`` yet, writing it after every row; return the rows of these groups."""
    console = Console()
    known = {row["key"]: row for row in json.loads(json_file.read_text())} if json_file.exists() else {}
    result = []
    for row in (row for group in groups for row in GROUPS[group](config)):
        changed = changed_config(config, row.changes)
        key = digest_of(row.depends_on(changed))
        if key not in known:
            console.print(f"{row.group}: {row.name} {row.changes or row.arguments or ''}")
            model = Path(changed.model.path)
            if row.make_model is not None and not model.exists():
                in_own_process(row.make_model, config, model)
            started = time.perf_counter()
            found = in_own_process(row.measure, changed, *row.arguments)
            known[key] = {"group": row.group, "name": row.name, **found, "key": key}
            known[key]["seconds"] = round(time.perf_counter() - started)
            known[key]["compute_type"] = compute_type(changed)
            _name_references(list(known.values()))
            json_file.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
        result.append(known[key])
    console.print(as_table(result))
    return result


def _name_references(rows: list[dict]) -> None:
    """Every row names the perplexity of the float model that it is to be compared with: finetuned rows that of the
    float model finetuned on the same tokens, None until that row is there."""
    references = {(row["group"], row["tokens"]): row["perplexity"] for row in rows if row["name"] == "float"}
    for row in rows:
        tokens = row["tokens"] if row["step_s"] else 0  # of blocks alone: no float model learns from these
        row["float_perplexity"] = references.get((row["group"], tokens))


def changed_config(config: RunConfig, changes: dict) -> RunConfig:
    """The config with ``{"section.key": value}`` applied, in a run folder that rows with the same start share."""
    from mbdist.train.prepare import preparation_settings

    changed = with_changes(config, changes)
    start = digest_of(preparation_settings(changed))
    return changed.model_copy(update={"run_dir": str(Path(config.run_dir) / start)})

"""Prints plans."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mbdist.config import RunConfig
from mbdist.plan.advice import Advice
from mbdist.plan.memory import MemoryPlan
from mbdist.plan.rates import Rates
from mbdist.plan.room import Room
from mbdist.plan.step_time import StepPlan

_CATEGORIES = {
    "planes": "planes",
    "accumulators": "accumulators",
    "curvature": "curvature",
    "trained_floats_and_moments": "scales and other trained floats, masters, moments",
    "gradients": "their gradients, and the buffer that these leave from",
    "frozen_floats": "embeddings, norms, head",
    "teacher": "teacher",
    "activations": "activations that wait for backward",
    "temporaries": "temporaries of the last block's backward",
    "logits": "logits",
    "scratch": "the largest weight, dense",
    "libraries": "libraries, on first use",
    "gathered": "gathered by ZeRO-3 at a time",
    "communication": "signals in buckets",
}


def memory_table(console: Console, plan: MemoryPlan, workers: int) -> None:
    table = Table("memory of a worker", "GiB")
    sizes = plan.categories()
    for name, meaning in _CATEGORIES.items():
        if sizes.get(name):
            table.add_row(meaning, _gib(sizes[name]))
    table.add_section()
    table.add_row(f"in all, at the fullest moment ({workers} worker{'s' * (workers > 1)})", _gib(plan.total))
    console.print(table)


def activations_line(plan: MemoryPlan, otherwise: MemoryPlan, config: RunConfig) -> str:
    """The plan beside that of the same run with activation checkpointing the other way."""
    on = config.train.activation_checkpointing
    words = [
        f"{_gib(of.activations)} GiB {'with' if checkpointed else 'without'} activation checkpointing "
        f"({_gib(of.total)} in all)"
        for of, checkpointed in ((plan, on), (otherwise, not on))
    ]
    return f"activations: {words[0]}, {words[1]}"


def step_table(console: Console, step: StepPlan, rates: Rates) -> None:
    table = Table("a worker sends in a step", "GB")
    for phase, size in step.sent.items():
        if size:
            table.add_row(phase.replace("_", " "), f"{size / 1e9:,.3f}")
    table.add_section()
    table.add_row("in all", f"{sum(step.sent.values()) / 1e9:,.3f}")
    console.print(table)
    speeds = [
        step.tokens / s for s in (step.compute_s + step.communication_s, max(step.compute_s, step.communication_s))
    ]
    console.print(
        f"a step of {step.tokens:,} tokens: {step.compute_s:.3g} s of computing and {step.communication_s:.3g} s of "
        f"communication, {speeds[0]:,.0f} to {speeds[1]:,.0f} tokens/s as they overlap"
    )
    console.print(f"computing: {rates.source}; communication: bytes at the rates of the links", markup=False)


def dry_run_table(console: Console, rows: list[dict], seconds: float) -> None:
    """``rows`` as of ``beside_plan``."""
    table = Table(f"dry run of worker 0 and one micro-batch, {seconds:.0f} s", "found", "planned")
    for row in rows:
        cells = [_count(row["what"], row[side]) for side in ("found", "planned")]
        table.add_row(row["what"].replace("_", " "), *cells)
    console.print(table)


def _count(what: str, size: int | None) -> str:
    if size is None:
        return ""
    return f"{size:,}" if what.startswith(("words", "buckets")) else f"{size / 2**30:,.3f} GiB"


def advice_lines(found: list[Advice], room: Room) -> str:
    """What to change, a line each."""
    lines = [f"  {each.setting}: {_gib(each.memory.total)} GiB a worker ({each.costs})" for each in found]
    if not found or not room.holds(found[-1].memory):
        lines.append("  not enough by themselves: more workers under cluster.zero_stage=3 divide what is kept")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"

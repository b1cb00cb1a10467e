"""Prints plans."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mbdist.plan.advice import Advice
from mbdist.plan.memory import MemoryPlan
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


def step_table(console: Console, step: StepPlan) -> None:
    table = Table("a worker sends in a step", "GB")
    for phase, size in step.sent.items():
        if size:
            table.add_row(phase.replace("_", " "), f"{size / 1e9:,.3f}")
    table.add_section()
    table.add_row("in all", f"{sum(step.sent.values()) / 1e9:,.3f}")
    console.print(table)
    rates = [
        step.tokens / s for s in (step.compute_s + step.communication_s, max(step.compute_s, step.communication_s))
    ]
    console.print(
        f"a step of {step.tokens:,} tokens: {step.compute_s:.3g} s of computing and {step.communication_s:.3g} s of "
        f"communication, {rates[0]:,.0f} to {rates[1]:,.0f} tokens/s as they overlap. From data sheets, not measured."
    )


def advice_lines(console: Console, found: list[Advice], fits: bool) -> None:
    for each in found:
        console.print(f"  {each.setting}: {_gib(each.memory.total)} GiB ({each.costs})", markup=False)
    if not fits:
        console.print("  not enough by themselves: more workers under cluster.zero_stage=3 divide what is kept")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"

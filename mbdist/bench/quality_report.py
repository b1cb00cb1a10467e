"""The table of ``mbdist bench quality`` as markdown, and perplexity against bits as a picture, beside the results."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from mbdist.errors import UserError

_COLUMNS = ("name", "planes", "bits", "tokens", "perplexity", "x float", "KL", "state, B/weight", "s/step", "type")


def write_report(json_file: Path) -> None:
    """``quality.md`` and ``quality.svg`` from all rows of ``quality.json``."""
    rows = json.loads(json_file.read_text(encoding="utf-8"))
    json_file.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, json_file.with_suffix(".svg"))


def as_table(rows: list[dict]) -> Table:
    """For the terminal."""
    table = Table("group", *_COLUMNS)
    for row in rows:
        table.add_row(row["group"], *_cells(row))
    return table


def markdown(rows: list[dict]) -> str:
    """One table a group."""
    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines = [f"## {group}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row["group"] == group]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cells(row: dict) -> list[str]:
    ratio = row["perplexity"] / row["float_perplexity"] if row.get("float_perplexity") else None
    return [
        row["name"],
        str(row["planes"] or ""),
        f"{row['bits']:.2f}",
        f"{row['tokens']:,}" if row["tokens"] else "",
        f"{row['perplexity']:,.2f}",
        *(
            "" if value is None else f"{value:,.2f}"
            for value in (ratio, row["kl"], row["state_bytes_per_weight"], row["step_s"])
        ),
        row["compute_type"],
    ]


def draw(rows: list[dict], picture: Path) -> None:
    """Perplexity over the float model's against bits a weight, a line a method."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install 'mbdist[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        drawn = row["group"] in ("start", "finetuned") or row["name"] == "second-order"
        if drawn and row["name"] != "float" and row.get("float_perplexity"):
            label = f"{row['name']}, finetuned" if row["step_s"] else row["name"]
            curves.setdefault(label, []).append((row["bits"], row["perplexity"] / row["float_perplexity"]))
    for label, points in curves.items():
        ours = label in ("calibrated", "reconstructed", "second-order") or "finetuned" in label
        style = "-" if ours else "--"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=4, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(yscale="log", xlabel="bits a weight, scales included", ylabel="perplexity / float model's")
    axes.set_ylim(top=1e3)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)

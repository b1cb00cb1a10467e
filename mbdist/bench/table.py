"""Rows of a result on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table


def table_of(rows: Sequence[dict], title: str | None = None, without: Collection[str] = ()) -> Table:
    """Keys of the first row are the columns, but for those ``without``."""
    names = [name for name in (rows[0] if rows else ()) if name not in without]
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in names))
    return table

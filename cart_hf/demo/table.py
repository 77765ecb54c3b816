"""The comparison as a table: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from cart_hf.demo.comparison import Row, settings_text

NAMES = {
    "average": "weight average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "consensus": "Consensus TA",
    "dare": "DARE",
    "cart": "CART",
}


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    individual = next(row for row in rows if row.name == "individual")
    return [
        [
            name_of(row),
            *(f"{score:.1f}" for score in row.scores.values()),
            f"{row.average:.1f}",
            f"{row.normalised(individual):.1f}",
            settings_text(row.settings),
        ]
        for row in rows
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    header = ["", *rows[0].scores, "average", "normalised", "chosen on validation"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in _cells(rows))]) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table for programs."""
    return [{"name": r.name, "settings": dict(r.settings), "scores": r.scores, "average": r.average} for r in rows]


def name_of(row: Row) -> str:
    """Return what people call a row's method."""
    return NAMES.get(row.name, row.name)


def terminal(rows: Sequence[Row]) -> Table:
    """Return the table for the terminal: averages first, then the tasks as columns, names shortened."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for name in rows[0].scores:
        table.add_column("\n".join(name.split("_")[:2])[:16], justify="right", vertical="bottom")
    table.add_column("average", justify="right")
    table.add_column("norm.", justify="right")
    for row, cells in zip(rows, _cells(rows), strict=True):
        table.add_row(*cells[:-1], style="bold" if row.name == "cart" else None)
    return table

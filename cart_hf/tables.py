"""A table of results, for the terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LATEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"})


@dataclass(frozen=True)
class Table:
    """Cells of text, numbers formatted.

    :param header: the columns' titles.
    :param rows: the cells, the first of each row naming it.
    :param words: how many columns at the end hold words, not numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 0


def span(least: int, most: int) -> str:
    """Return two numbers as ``8-29``, or one where they are the same."""
    return str(least) if least == most else f"{least}-{most}"


def markdown(table: Table) -> str:
    """Return the table as Markdown, numbers to the right."""
    numbers = len(table.header) - 1 - table.words
    lines = [_line(table.header), "|" + "---|" + "---:|" * numbers + "---|" * table.words]
    return "\n".join([*lines, *(_line([cell.replace("|", r"\|") for cell in row]) for row in table.rows)]) + "\n"


def latex(table: Table) -> str:
    """Return the table as LaTeX, for the booktabs package."""
    columns = "l" + "r" * (len(table.header) - 1 - table.words) + "l" * table.words

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

    body = [line(table.header), r"\midrule", *map(line, table.rows)]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def comma_separated(table: Table) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
    return text.getvalue()


def terminal(table: Table) -> Any:
    """Return the table as rich renders it."""
    from rich.table import Table as RichTable

    drawn = RichTable(box=None, pad_edge=False)
    for position, title in enumerate(table.header):
        is_number = 0 < position < len(table.header) - table.words
        drawn.add_column(title, justify="right" if is_number else "left", overflow="fold", no_wrap=position == 0)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

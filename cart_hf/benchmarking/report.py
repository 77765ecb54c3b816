"""A benchmark's table and plots, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cart_hf import tables
from cart_hf.benchmarking.rows import INDIVIDUAL, PRETRAINED, Row, settings_text
from cart_hf.benchmarking.run import BenchmarkResult
from cart_hf.errors import UserError
from cart_hf.evaluation.report import percent
from cart_hf.tables import Table

RESULTS_FILE, PAGE_FILE = "benchmark.json", "benchmark.md"


def as_table(rows: Sequence[Row]) -> Table:
    """Return one row for each model or method, one column for each task, scores in percent."""
    tasks = task_names(rows)
    header = ["", *tasks, "average", "normalised", "settings"]
    return Table(header, [[row.name, *_cells(row, tasks), settings_text(row.parameters)] for row in rows], words=1)


def terminal_table(rows: Sequence[Row], width: int = 100) -> Any:
    """Return the table for a terminal, settings below it; many tasks leave the averages only.

    :param width: columns of characters there are.
    """
    from rich.table import Table as RichTable

    tasks = task_names(rows)
    titles = ["\n".join(name.split("_")[:2])[:17] for name in tasks]
    if sum(max(5, *map(len, title.split("\n"))) + 1 for title in titles) > width - 40:
        tasks, titles = [], []
    drawn = RichTable(box=None, pad_edge=False, collapse_padding=True)
    drawn.add_column("", no_wrap=True)
    for title in [*titles, "avg.", "norm."]:
        drawn.add_column(title, justify="right", vertical="bottom")
    for row in rows:
        drawn.add_row(row.name, *_cells(row, tasks), style="bold" if row.method == "cart" else None)
    return drawn


def task_names(rows: Sequence[Row]) -> list[str]:
    """Return the tasks that any row has a result for."""
    return list(dict.fromkeys(name for row in rows for name in row.results.tasks))


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    results = row.results
    scores = [percent(results.tasks[name].score if name in results.tasks else None) for name in tasks]
    whole = not results.errors  # an average over fewer tasks than the other rows' would mislead
    return [*scores, percent(results.average if whole else None), percent(results.normalized if whole else None)]


def as_json(result: BenchmarkResult) -> dict[str, Any]:
    """Return the benchmark for programs."""
    return {
        "evaluation": result.evaluation.model_dump(mode="json", exclude_none=True),
        "selection": result.selection.model_dump(mode="json") if result.selection is not None else None,
        "rows": [
            {
                "name": row.name,
                "method": row.method,
                "parameters": dict(row.parameters),
                "on_edge": list(row.on_edge),
                "points": list(row.points),
                **row.results.to_dict(),
            }
            for row in result.rows
        ],
    }


def notes(result: BenchmarkResult) -> list[str]:
    """Say how the settings were chosen, and what to be careful about."""
    found = []
    if result.selection is not None:
        of_each = f", {result.selection.limit} examples of each task" if result.selection.limit else ""
        chosen = "; ".join(f"{row.name}: {settings_text(row.parameters)}" for row in result.rows if row.parameters)
        found.append(f"Chosen by the average score on the {result.selection.split} split{of_each}: {chosen}.")
        if result.selection.split == result.evaluation.split:
            found.append("That is the split they are scored on: the numbers flatter methods with many settings.")
    for row in result.rows:
        if row.on_edge:
            found.append(f"{row.name}: the best {' and '.join(row.on_edge)} is at the edge of the values tried.")
    several = {result.metric for row in result.rows for result in row.results.tasks.values()}
    if any(metric.startswith("mean of") for metric in several):
        found.append("Tasks with several metrics are scored by their mean (MRPC, QQP: accuracy and F1).")
    return found


def write_files(result: BenchmarkResult) -> list[str]:
    """Write the table (JSON, Markdown, CSV, LaTeX) and the plots; return what could not be drawn and why.

    :raises UserError: when a file cannot be written.
    """
    table = as_table(result.rows)
    drawn, left_out = _plots(result)
    parts = ["# Benchmark", *_plain(notes(result)), tables.markdown(table)]
    parts += [f"![{title}]({file})" for title, file in drawn]
    files = {
        RESULTS_FILE: json.dumps(as_json(result), indent=2) + "\n",
        PAGE_FILE: "\n\n".join(part.strip() for part in parts) + "\n",
        "benchmark.csv": tables.comma_separated(table),
        "benchmark.tex": tables.latex(table),
    }
    try:
        for name, text in files.items():
            (result.output / name).write_text(text, encoding="utf-8")
    except OSError as failure:
        raise UserError(f"cannot write {result.output}: {failure.strerror or failure}") from failure
    return left_out


def _plain(sentences: list[str]) -> list[str]:
    return [" ".join(sentences)] if sentences else []


def _plots(result: BenchmarkResult) -> tuple[list[tuple[str, str]], list[str]]:
    from cart_hf.benchmarking.figures import bars, radar

    merges = {row.name: row.results for row in result.rows if row.method is not None and not row.results.errors}
    references = {
        row.name: row.results.average
        for row in result.rows
        if row.name in (PRETRAINED, INDIVIDUAL) and row.results.average is not None
    }
    normalised = {
        name: {task: r.score / found.individual[task] for task, r in found.tasks.items() if found.individual.get(task)}
        for name, found in merges.items()
    }
    averages = {name: found.average for name, found in merges.items() if found.average is not None}
    try:
        if not averages:
            return [], []
        bars(averages, [result.output / f"bars.{kind}" for kind in ("png", "svg")], references)
        drawn = [("average scores", "bars.png")]
        if all(normalised.values()):
            radar(normalised, [result.output / f"radar.{kind}" for kind in ("png", "svg")])
            drawn.append(("normalised scores", "radar.png"))
    except UserError as failure:  # no matplotlib: the numbers are what matters
        return [], failure.problems
    return drawn, []

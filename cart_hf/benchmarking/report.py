"""A benchmark's table and plots, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cart_hf import tables
from cart_hf.benchmarking.rows import COMPRESS, INDIVIDUAL, PRETRAINED, Row, settings_text
from cart_hf.benchmarking.run import BenchmarkResult
from cart_hf.errors import UserError
from cart_hf.evaluation.report import percent, transductive
from cart_hf.recipe.benchmark import FORMS, INDEXING
from cart_hf.tables import Table

RESULTS_FILE, PAGE_FILE = "benchmark.json", "benchmark.md"


def as_table(rows: Sequence[Row]) -> Table:
    """Return one row for each model or method, one column for each task, scores in percent, sizes if compared."""
    tasks = task_names(rows)
    header = ["", *tasks, "average", "normalised", *(["size (MB)"] if _sized(rows) else []), "settings"]
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
    for title in [*titles, "avg.", "norm.", *(["MB"] if _sized(rows) else [])]:
        drawn.add_column(title, justify="right", vertical="bottom")
    for row in rows:
        drawn.add_row(row.name, *_cells(row, tasks), style="bold" if row.method == "cart" else None)
    return drawn


def task_names(rows: Sequence[Row]) -> list[str]:
    """Return the tasks that any row has a result for."""
    return list(dict.fromkeys(name for row in rows for name in row.results.tasks))


def _sized(rows: Sequence[Row]) -> bool:
    return any(row.nbytes is not None for row in rows)


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    results = row.results
    scores = [percent(results.tasks[name].score if name in results.tasks else None) for name in tasks]
    whole = not results.errors  # an average over fewer tasks than the other rows' would mislead
    size = [] if row.nbytes is None else [f"{row.nbytes / 1e6:.1f}"]
    return [*scores, percent(results.average if whole else None), percent(results.normalized if whole else None), *size]


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
                **({} if row.nbytes is None else {"nbytes": row.nbytes}),
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
        methods = [row for row in result.rows if row.parameters and row.method != COMPRESS]
        chosen = "; ".join(f"{row.name}: {settings_text(row.parameters)}" for row in methods)
        found.append(f"Chosen by the average score on the {result.selection.split} split{of_each}: {chosen}.")
        if result.selection.split == result.evaluation.split:
            found.append("That is the split they are scored on: the numbers flatter methods with many settings.")
    for row in result.rows:
        if row.on_edge:
            found.append(f"{row.name}: the best {' and '.join(row.on_edge)} is at the edge of the values tried.")
    for row in result.rows:
        sentence = transductive(row.results)
        if sentence is not None:
            found.append(f"{row.name}: {sentence}.")
    if _sized(result.rows):
        found.append(
            "Sizes are of weights, for all tasks together: the individual models; or one backbone and every head; for "
            f"{INDEXING} and {FORMS['tsv_c']} those and every adapter; for {FORMS['emr']} those, every mask, and the "
            "base's backbone. What only the base has, such as a text tower, counts nowhere."
        )
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
    from cart_hf.benchmarking.figures import bars, radar, sizes

    whole = [row for row in result.rows if not row.results.errors]
    merges = {row.name: row.results for row in whole if row.method not in (None, COMPRESS)}
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
    curve, models = _places(whole)
    drawn: list[tuple[str, str]] = []
    try:
        if averages:
            bars(averages, _files(result, "bars"), references)
            drawn.append(("average scores", "bars.png"))
        if averages and all(normalised.values()):
            radar(normalised, _files(result, "radar"))
            drawn.append(("normalised scores", "radar.png"))
        if curve:
            by_budget = any("budget" in row.parameters for row in whole if row.method == COMPRESS)
            labels = f"labels: {'size of each adapter' if by_budget else 'rank kept'}"
            sizes(curve, _files(result, "sizes"), models, labels)
            drawn.append(("size and score", "sizes.png"))
    except UserError as failure:  # no matplotlib: the numbers are what matters
        return [], failure.problems
    return drawn, []


def _files(result: BenchmarkResult, name: str) -> list[Path]:
    return [result.output / f"{name}.{kind}" for kind in ("png", "svg")]


def _places(rows: Sequence[Row]) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Return size and score relative to the individual models', of CART-Indexing and of all others by name."""
    alone = next((row.nbytes for row in rows if row.name == INDIVIDUAL), None)
    curve, models = {}, {}
    for row in rows:
        score = row.results.normalized
        if not alone or row.nbytes is None or score is None or row.name == PRETRAINED:
            continue
        if row.method == COMPRESS and row.name not in FORMS.values():
            curve[row.name.removeprefix(INDEXING).strip()] = (row.nbytes / alone, score)
        else:
            models[row.name] = (row.nbytes / alone, score)
    return curve, models

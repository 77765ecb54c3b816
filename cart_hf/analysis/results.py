"""Scores beside an analysis: a benchmark's table, an evaluation's results, and the points of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.benchmarking.report import RESULTS_FILE as BENCHMARK_FILE
from cart_hf.benchmarking.rows import INDIVIDUAL, settings_text
from cart_hf.errors import UserError
from cart_hf.evaluation.results import Results
from cart_hf.tuning.record import FORMAT as TUNING_FORMAT
from cart_hf.tuning.record import RECORD_FILE as TUNING_FILE

RESULTS_FILE = "results.json"
MERGED = "merged model"
"""The name of the row that an evaluation is."""

_TUNING = ("method", "parameters", "split", "limit", "points", "best", "on_edge")
_POINT = ("parameters", "average", "scores")


def read_results(path: Path) -> dict[str, Any]:
    """Read a table of scores.

    :param path: ``benchmark.json``, ``results.json``, or a folder of ``cart-hf benchmark`` or ``cart-hf evaluate``.
    :return: ``source`` (``benchmark`` or ``evaluation``), ``tasks`` and ``rows``, each with its ``name``, ``method``,
        ``settings`` as a text, ``scores`` by task as fractions, ``average`` and ``normalized``, which are None where
        tasks failed, and ``nbytes``. The results of an evaluation are one row, and its individual models a second one
        where their scores are known.
    :raises UserError: when it is neither.
    """
    data = _load(path, (BENCHMARK_FILE, RESULTS_FILE), "a benchmark (benchmark.json) or an evaluation (results.json)")
    try:
        if "rows" in data:
            return _table("benchmark", [_of_row(row) for row in data["rows"]])
        return _table("evaluation", _of_evaluation(Results.from_dict(data)))
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise UserError(
            f"{path} is neither what cart-hf benchmark writes nor what cart-hf evaluate writes: give benchmark.json, "
            "results.json, or the folder of one"
        ) from failure


def read_tuning(path: Path) -> dict[str, Any]:
    """Read the points of a search.

    :param path: ``tuning.json``, or the folder of ``cart-hf tune``.
    :return: the ``method``, the ``parameters`` that were searched, ``split``, ``limit``, ``points``, ``best`` and
        ``on_edge``.
    :raises UserError: when it is neither.
    """
    data = _load(path, (TUNING_FILE,), "a search (tuning.json)")
    found = data.get("format")
    if found != TUNING_FORMAT:
        words = f"its format is {found!r}" if found else "it names no format"
        raise UserError(f"{path} is not what cart-hf tune writes: {words}; expected {TUNING_FORMAT!r}")
    try:
        points = [{key: point[key] for key in _POINT} for point in data["points"]]
        return {**{key: data[key] for key in _TUNING}, "points": points}
    except (KeyError, TypeError) as failure:
        raise UserError(f"{path} is not what cart-hf tune writes: {failure} is missing or misplaced") from failure


def _load(path: Path, names: tuple[str, ...], expected: str) -> dict[str, Any]:
    """Read a JSON object.

    :param path: the file, or the folder where it lies.
    :param names: what it may be called in a folder; the first that is there counts.
    """
    if path.is_dir():
        inside = next((path / name for name in names if (path / name).is_file()), None)
        if inside is None:
            raise UserError(f"{path} has no {' or '.join(names)}: expected the folder of {expected}")
        path = inside
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}; expected {expected}") from failure
    except ValueError as failure:
        raise UserError(f"{path} is not JSON: expected {expected}") from failure
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object: expected {expected}")
    return data


def _table(source: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for row in rows for task in row["scores"]))
    return {"source": source, "tasks": tasks, "rows": rows}


def _of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    scores = {task: _known(result["score"]) for task, result in row["tasks"].items()}
    whole = not row["errors"]  # an average over fewer tasks than the other rows' would mislead
    return {
        "name": row["name"],
        "method": row["method"],
        "settings": settings_text(row["parameters"]),
        "scores": scores | dict.fromkeys(row["errors"]),
        "average": _known(row["average"]) if whole else None,
        "normalized": _known(row["normalized"]) if whole else None,
        "nbytes": row.get("nbytes"),
    }


def _of_evaluation(results: Results) -> list[dict[str, Any]]:
    merged = {"name": MERGED, "method": None, "parameters": {}, **results.to_dict()}
    alone = [results.individual.get(task) for task in results.tasks]
    rows = [_of_row(merged)]
    if any(score is not None for score in alone):
        known = [score for score in alone if score is not None]
        rows.append(
            {
                "name": INDIVIDUAL,
                "method": None,
                "settings": "",
                "scores": dict(zip(results.tasks, alone, strict=True)),
                "average": sum(known) / len(known) if len(known) == len(alone) else None,
                "normalized": 1.0 if len(known) == len(alone) else None,
                "nbytes": None,
            }
        )
    return rows


def _known(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else score

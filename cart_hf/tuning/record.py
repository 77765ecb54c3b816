"""A search as files: the best recipe, all points, and what is to be said of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf import tables
from cart_hf.errors import UserError, telling
from cart_hf.evaluation.report import percent
from cart_hf.tables import Table
from cart_hf.tuning.data_free import RULE
from cart_hf.tuning.run import Tuned

FORMAT = "cart-hf tuning 1"
RECIPE_FILE, RECORD_FILE, POINTS_FILE = "recipe.yaml", "tuning.json", "points.csv"


def as_json(found: Tuned) -> dict[str, Any]:
    """Return the search for programs."""
    selection = found.selection
    return {
        "format": FORMAT,
        "method": found.recipe.merge_method,
        "rule": RULE if found.trial is None else None,
        "parameters": searched(found),
        "split": selection.split if selection is not None else None,
        "limit": selection.limit if selection is not None else None,
        "points": [
            {
                "parameters": _searched(found, point.parameters),
                "average": point.results.average,
                "scores": {task: result.score for task, result in point.results.tasks.items()},
            }
            for point in found.points
        ],
        "best": _searched(found, found.best),
        "on_edge": list(found.on_edge),
        "seconds": {name: round(value, 2) for name, value in found.seconds.items()},
    }


def _searched(found: Tuned, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was chosen of a point's parameters."""
    return {name: parameters[name] for name in searched(found)}


def searched(found: Tuned) -> list[str]:
    """Return the names of the parameters that were chosen."""
    return list(found.trial.grid) if found.trial is not None else ["rank_ratio", "scale"]


def as_table(found: Tuned, *, tasks: bool = True) -> Table:
    """Return one row for each point, scores in percent.

    :param tasks: with a column for each task.
    """
    grid = searched(found)
    names = list(found.points[0].results.tasks) if found.points and tasks else []
    rows = [
        [
            *(str(point.parameters[name]) for name in grid),
            percent(point.results.average),
            *(percent(point.results.tasks[name].score) for name in names),
        ]
        for point in found.points
    ]
    return Table([*grid, "average", *names], rows)


def notes(found: Tuned) -> list[str]:
    """Say how far the best settings are to be trusted."""
    if found.trial is None:
        return [f"Chosen without data, by a rule ({RULE}): measure what you merge with it."]
    said = []
    for name in found.on_edge:
        values = found.trial.grid[name]
        least = found.best[name] == min(values)
        said.append(
            f"The best {name}, {found.best[name]}, is the {'least' if least else 'largest'} that was tried: try "
            f"{'less' if least else 'more'} (--grid {name}=..., with --resume: what was measured stays)."
        )
    assert found.selection is not None  # there are points
    if found.selection.split == found.scored_split:
        said.append(
            f"The points were compared on the split that the recipe is evaluated on ({found.scored_split}): its score "
            "there flatters the merge."
        )
    return said


def write_files(found: Tuned) -> list[str]:
    """Write the best recipe, the points (JSON, CSV) and the figures; return what could not be drawn and why.

    :raises UserError: when a file cannot be written.
    """
    files = {RECIPE_FILE: found.recipe.to_yaml(), RECORD_FILE: json.dumps(as_json(found), indent=2) + "\n"}
    if found.points:
        files[POINTS_FILE] = tables.comma_separated(as_table(found))
    with telling(f"cannot write {found.output}"):
        for name, text in files.items():
            (found.output / name).write_text(text, encoding="utf-8")
    return _draw(found)


def _draw(found: Tuned) -> list[str]:
    from cart_hf.tuning.figures import RANK_RATIO, rank_curve, tuning_map, weight_average

    if found.trial is None or len(found.points) < 2:
        return []
    points = [(_searched(found, point.parameters), point.results.average or 0.0) for point in found.points]
    names, best = searched(found), _searched(found, found.best)
    try:
        tuning_map(points, names, best, _paths(found.output, "heat-map"))
        if len(found.trial.grid.get(RANK_RATIO, ())) > 1:
            rank_curve(points, best, _paths(found.output, "rank-curve"), weight_average(points))
    except UserError as failure:  # no matplotlib: the numbers are what matters
        return failure.problems
    return []


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{kind}" for kind in ("png", "svg")]

"""What the page says in words and tables: all that can be read without a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cart_hf.figures.style import INDIVIDUAL, is_cart

_ROLES = {
    "low_rank": "truncated to their rank",
    "matrix": "merged as whole matrices",
    "elementwise": "merged number by number",
    "average": "averaged",
    "base": "kept from the base",
}


_ALIKE = 0.02  # a relative change of I(k) that is none to speak of


def number(value: float | None) -> str:
    """Return a number of three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in percent, without the sign, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def ratio(value: float) -> str:
    """Return a share of the full rank: ``8 %``."""
    return f"{100 * value:.3g}\u202f%"


def setting(value: Any) -> str:
    """Return a setting as the recipe has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def kept_ratio(document: Mapping[str, Any]) -> float | None:
    """Return the share of the full rank that the merge keeps of a matrix: the median; None without matrices."""
    shares = [matrix["rank"] / min(matrix["shape"]) for matrix in document["matrices"]]
    return statistics.median(shares) if shares else None


def trade_off(document: Mapping[str, Any], kept: float | None) -> dict[str, Any]:
    """Return what the averaged curves say at the merge's rank, interpolated.

    :returns: ``lost``, R(k)/R(0) around the average; ``centred`` and ``uncentred``, I(k); ``change``, from the latter
        to the former, in words. Those that are known.
    """
    curves = {"lost": ("average", "reconstruction"), "centred": ("average", "interference")}
    curves["uncentred"] = ("base", "interference")
    found: dict[str, Any] = {}
    for name, (centre, key) in curves.items():
        values = (document["mean"].get(centre) or {}).get(key) or ()
        points = [(x, y) for x, y in zip(document["about"]["ratios"], values, strict=False) if y is not None]
        if points and kept is not None:
            found[name] = float(np.interp(kept, [x for x, _ in points], [y for _, y in points]))
    if found.get("uncentred") and "centred" in found:
        change = found["centred"] / found["uncentred"] - 1
        more = f"{percent(abs(change), 0)}\u202f% {'less' if change <= 0 else 'more'} than"
        found["change"] = f"{more if abs(change) >= _ALIKE else 'about as much as'} uncentred"
    return found


def verdict(document: Mapping[str, Any], kept: float | None) -> str:
    """Return the analysis in one line: how good the merge is, or else what its rank trades."""
    about, results = document["about"], document["results"]
    rows = results["rows"] if results else []
    evaluated = results is not None and results["source"] == "evaluation"  # of the merged model, which is the first row
    ours = _best(rows[:1] if evaluated else [row for row in rows if row["method"] == about["method"]])
    if ours is not None and ours["normalized"] is not None:
        plain = _best([row for row in rows if row["method"] == "average" and row["normalized"] is not None])
        against = (
            f"; their weight average keeps {percent(plain['normalized'])}\u202f%" if plain not in (None, ours) else ""
        )
        return (
            f"The merged model keeps {percent(ours['normalized'])}\u202f% of the {len(about['models'])} models’ own "
            f"scores, {percent(ours['average'])} on average{against}."
        )
    if ours is not None:
        return f"The merged model scores {percent(ours['average'])} on average over {len(results['tasks'])} tasks."
    found = trade_off(document, kept)
    if kept is None or "lost" not in found:
        return f"{len(about['models'])} models, merged by {about['title']}."
    lost = f"{percent(found['lost'], 0)}\u202f%"
    first = f"At {ratio(kept)} of the full rank, the merge leaves out {lost} of what sets the models apart"
    return f"{first}; centred, they collide {found['change']}." if "change" in found else f"{first}."


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    measured = [row for row in rows if row["average"] is not None]
    return max(measured, key=lambda row: row["average"], default=None)


def results_table(results: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the rows as texts, the best merged model of each column marked; and whether there is a radar to draw."""
    if results is None or not results["rows"]:
        return None
    rows, tasks = results["rows"], results["tasks"]
    columns = [[row["scores"].get(task) for row in rows] for task in tasks]
    columns += [[row["average"] for row in rows], [row["normalized"] for row in rows]]
    merged = [row["method"] is not None for row in rows]
    best = [_greatest([x for x, counts in zip(column, merged, strict=True) if counts]) for column in columns]
    alone = next((row for row in rows if row["name"] == INDIVIDUAL), None)
    return {
        "tasks": tasks,
        "rows": [
            {
                "name": row["name"],
                "settings": row["settings"],
                "emphasised": is_cart(row["name"]) or (results["source"] == "evaluation" and row is rows[0]),
                "megabytes": "–" if row.get("nbytes") is None else f"{row['nbytes'] / 1e6:.1f}",
                "cells": [
                    {"text": percent(column[i]), "best": merged[i] and column[i] is not None and column[i] == most}
                    for column, most in zip(columns, best, strict=True)
                ],
            }
            for i, row in enumerate(rows)
        ],
        "sized": any(row.get("nbytes") is not None for row in rows),
        "marked": sum(merged) > 1,
        "radar": len(tasks) >= 3 and len(rows) > 1 and alone is not None and any(map(alone["scores"].get, tasks)),
    }


def _greatest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def tuned(tuning: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a search chose, in words; None where there was none, or it has no points."""
    if tuning is None or not tuning["points"]:
        return None
    best = tuning["best"] or {}
    scored = [point["average"] for point in tuning["points"] if point["parameters"] == best]
    limit = tuning["limit"]
    return {
        "count": len(tuning["points"]),
        "best": ", ".join(f"{name} {setting(value)}" for name, value in best.items()),
        "score": scored[0] if scored else None,
        "where": f"the {tuning['split']} split" + (f", at most {limit} examples of each task" if limit else ""),
        "on_edge": " and ".join(tuning["on_edge"]),
    }


def theorem(bounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return how tight the bound is on every matrix, as loss / bound; None where no inputs were given."""
    if not bounds:
        return None
    rows = [
        {**bound, "ratio": bound["loss"] / bound["bound"] if bound["loss"] is not None and bound["bound"] else None}
        for bound in bounds
    ]
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    return {
        "rows": rows,
        "holds": sum(value <= 1 for value in ratios),
        "count": len(ratios),
        "median": statistics.median(ratios) if ratios else None,
        "most": max(ratios, default=None),
    }


def roles(counts: Mapping[str, int]) -> list[tuple[int, str]]:
    """Return how many tensors met which fate, in words."""
    return [(count, _ROLES.get(role, role.replace("_", " "))) for role, count in counts.items()]

"""Which points of a grid are tried, in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cart_hf.recipe import Trial

Point = dict[str, Any]
Score = Callable[[Point], float]


def search_grid(trial: Trial, score: Score) -> Point:
    """Try every point, the largest rank first (its factors serve the others), and scales one after the other.

    Return the best.

    Of equally good ones it is the first in the order of the grid.

    :param score: may be asked for a point again.
    """
    points = trial.points
    lines = list(dict.fromkeys(map(_line, points)))
    for point in sorted(points, key=lambda point: (-_rank(point), lines.index(_line(point)))):
        score(point)
    return max(points, key=score)


def search_coordinates(trial: Trial, start: Mapping[str, Any], score: Score) -> Point:
    """Vary one parameter at a time from the best point so far, until no parameter finds better; return the best.

    :param start: where to begin; a parameter that has none of the grid's values there begins in the middle of them.
    :param score: may be asked for a point again.
    """
    own = {name: start[name] if start.get(name) in values else _middle(values) for name, values in trial.grid.items()}
    best = {**trial.parameters, **own}
    while True:
        before = best
        for name, values in reversed(trial.grid.items()):  # the scale, which is cheap to vary, usually stands last
            best = max([best, *({**best, name: value} for value in values)], key=score)
        if best == before:
            return best


def _middle(values: Sequence[Any]) -> Any:
    return values[len(values) // 2]


def _rank(point: Mapping[str, Any]) -> float:
    found = [point.get(name) for name in ("rank_ratio", "rank", "energy")]
    return max((float(value) for value in found if isinstance(value, int | float)), default=0.0)


def _line(point: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in point.items() if name != "scale"}, sort_keys=True)

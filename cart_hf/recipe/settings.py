"""Settings of a parameter: a scalar, a gradient over layers, or a list of filters - mergekit's forms, same meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any


def scalars(setting: Any) -> Iterator[Any]:
    """Yield every scalar inside a setting, for validation.

    :raises ValueError: when the setting has none of the known forms.
    """
    if isinstance(setting, dict):
        unknown = set(setting) - {"filter", "value"}
        if unknown or "value" not in setting:
            raise ValueError(f"expected {{filter, value}}, found keys {sorted(map(str, setting))}")
        problem = pattern_problem(setting.get("filter", "*"))
        if problem:
            raise ValueError(f"filter {problem}")
        yield from scalars(setting["value"])
    elif isinstance(setting, list):
        if not setting:
            raise ValueError("an empty list has no value")
        for item in setting:
            yield from scalars(item)
    else:
        yield setting


def evaluate(setting: Any, names: Sequence[str], position: float) -> Any:
    """Return the value for one tensor, or None when no filter matches.

    :param names: the names the tensor goes by (canonical, and as stored on disk); a filter may match any.
    :param position: the layer's place, 0 (first) to 1 (last); 0 for tensors outside the layers.
    """
    if isinstance(setting, dict):
        return evaluate([setting], names, position)
    if isinstance(setting, list):
        if all(isinstance(item, dict) for item in setting):
            for item in setting:
                wanted = item.get("filter")
                if wanted is None or wanted == "*" or matches_filter(wanted, names):
                    return evaluate(item["value"], names, position)
            return None
        return _gradient(setting, position)
    return setting


def matches_filter(wanted: str, names: Sequence[str]) -> bool:
    """Whether a parameter filter matches: a substring (as in mergekit), or a regular expression after ``re:``."""
    if wanted.startswith("re:"):
        return any(re.search(wanted[3:], name) for name in names)
    return any(wanted in name for name in names)


def matches_pattern(pattern: str, names: Sequence[str]) -> bool:
    """Whether an include/exclude pattern matches: ``re:`` regular expression, glob (with ``*?[``), or substring."""
    if not pattern.startswith("re:") and any(c in pattern for c in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return matches_filter(pattern, names)


def pattern_problem(pattern: Any) -> str | None:
    """Say what is wrong with a filter or pattern, or None."""
    if not isinstance(pattern, str):
        return f"must be text, not {pattern!r}"
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as failure:
            return f"'{pattern}' is not a regular expression: {failure}"
    return None


def filters(setting: Any) -> list[str]:
    """Return the filters a setting uses, other than ``*``, to report those that match nothing."""
    if isinstance(setting, list):
        return [name for item in setting for name in filters(item)]
    if not isinstance(setting, dict):
        return []
    own = [] if setting.get("filter") in (None, "*") else [setting["filter"]]
    return own + filters(setting.get("value"))


def _gradient(points: list[Any], position: float) -> Any:
    """Interpolate piecewise linearly between numbers; pick one of other things."""
    last = len(points) - 1
    if not all(isinstance(p, int | float) and not isinstance(p, bool) for p in points):
        return points[int(position * last)]
    place = position * last
    left = min(int(place), last)
    right = min(left + 1, last)
    share = place - left
    return points[left] * (1 - share) + points[right] * share

"""A search's figures: the scores of two settings as a map, and the score over the rank ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.errors import UserError
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.cells import WRITTEN, add_scale, hatch, write_values
from cart_hf.figures.style import CART, FAINT, add_legend, number, without_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANK_RATIO, SCALE = "rank_ratio", "scale"
Points = Sequence[tuple[Mapping[str, Any], float]]
"""Settings that were tried, and the average score of each as a fraction; NaN where it could not be scored."""

_WIDTH, _COLUMN, _ROW = 9.0, 0.66, 0.4  # inches: at most of all columns, at most of one, of a row
_WIDE = 8.0  # least ratio of the largest to the smallest value on a logarithmic axis


def tuning_map(points: Points, names: Sequence[str], best: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw the scores over two settings as cells, the best framed; over a single setting as a line.

    Of more settings than two, the first two that vary are drawn, at the best values of the others, as the title says.
    Points that were not tried are hatched.

    :param points: settings and scores, in any order.
    :param names: the settings, the first to the right, the second upwards.
    :param best: the best point's settings.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :raises UserError: when matplotlib is not installed, or fewer than two points have a score.
    """
    known = _known(points)
    varying = [name for name in names if len(_values(known, name)) > 1]
    if not varying:
        raise UserError("no plot: fewer than two settings have a score to draw")
    drawn, others = varying[:2], varying[2:]
    known = [(settings, score) for settings, score in known if _same(settings, best, others)]
    title = f"at the best {_text(best, others)}" if others else ""
    if len(drawn) == 1:
        _draw_line(known, drawn[0], best, paths, title)
    else:
        _draw_map(known, drawn[0], drawn[1], best, paths, title)


def rank_curve(points: Points, best: Mapping[str, Any], paths: Sequence[Path], average: float | None) -> None:
    """Draw the scores over the rank ratio: a line for each scale, at the best values of all other settings.

    :param points: settings and scores, in any order; those without a ``rank_ratio`` are left out.
    :param best: the best point's settings.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param average: the weight average's score, a horizontal line; None: it is not known.
    :raises UserError: when matplotlib is not installed, or fewer than two rank ratios have a score.
    """
    others = [name for name in best if name not in (RANK_RATIO, SCALE)]
    known = [(s, score) for s, score in _known(points) if _is_number(s.get(RANK_RATIO)) and _same(s, best, others)]
    ratios = _values(known, RANK_RATIO)
    if len(ratios) < 2:
        raise UserError("no plot: fewer than two rank ratios have a score to draw")
    scales = _values(known, SCALE)
    with new_figure(7.0, max(4.2, 0.25 * len(scales) + 0.5), paths) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        for place, scale in enumerate(scales):
            line = sorted((s[RANK_RATIO], 100 * score) for s, score in known if _key(s.get(SCALE)) == _key(scale))
            is_best = _key(scale) == _key(best.get(SCALE))
            label = "merged" if scale is None else f"scale {_word(scale)}{' (best)' if is_best else ''}"
            colour = CART if is_best else _blues(len(scales))[place]
            axes.plot(
                *zip(*line, strict=True),
                color=colour,
                label=label,
                marker="o" if is_best else "os^vDP"[place % 6],
                markersize=6.5 if is_best else 4.5,
                linewidth=2.8 if is_best else 1.5,
                zorder=4 if is_best else 3,
            )
        if average is not None:
            style: Any = {"color": "#222222", "linestyle": (0, (4, 2)), "linewidth": 1.4}
            axes.axhline(100 * average, **style, label="weight average", zorder=2)
        _scale_axis(axes, ratios)
        axes.set_xlabel("rank ratio k / r")
        axes.set_ylabel("average score (%)")
        axes.set_title(f"at the best {_text(best, others)}" if others else "", size=10, color=FAINT, loc="left")
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        without_frame(axes)
        add_legend(figure, axes)


def weight_average(points: Points) -> float | None:
    """Return the score of the weight average, which CART is at scale 0 and at the whole rank, if one was tried."""
    for settings, score in _known(points):
        if settings.get(SCALE) == 0 or settings.get(RANK_RATIO) == 1:
            return score
    return None


def _draw_map(points: Points, across: str, up: str, best: Mapping[str, Any], paths: Sequence[Path], title: str) -> None:
    import numpy

    columns, rows = _values(points, across), _values(points, up)[::-1]
    scores = {(_key(s.get(up)), _key(s.get(across))): 100 * score for s, score in points}
    values = [[scores.get((_key(row), _key(column)), math.nan) for column in columns] for row in rows]
    width, height = min(_WIDTH, _COLUMN * len(columns)), _ROW * len(rows)
    with new_figure(width, height, paths) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        hatch(axes)
        image = axes.imshow(
            numpy.ma.masked_invalid(values), cmap="cividis", aspect="auto", interpolation="nearest", zorder=1
        )
        if width / len(columns) >= WRITTEN:
            write_values(axes, image, values, "{:.1f}".format)
        axes.set_xticks([column + 0.5 for column in range(len(columns) - 1)], minor=True)
        axes.set_yticks([row + 0.5 for row in range(len(rows) - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        words = [_word(column) for column in columns]
        upright = max(map(len, words)) * 0.085 > width / len(columns)
        axes.set_xticks(range(len(columns)), words, rotation=90 if upright else 0)
        axes.set_yticks(range(len(rows)), [_word(row) for row in rows])
        axes.set_xlabel(_title(across))
        axes.set_ylabel(_title(up))
        _frame_best(axes, columns, rows, best.get(across), best.get(up))
        axes.set_title(title, size=10, color=FAINT, loc="left", pad=8)
        add_scale(figure, axes, image, "average score (%)")


def _frame_best(axes: Axes, columns: Sequence[Any], rows: Sequence[Any], across: Any, up: Any) -> None:
    from matplotlib.patches import Rectangle

    for column, value in enumerate(columns):
        for row, other in enumerate(rows):
            if (_key(value), _key(other)) == (_key(across), _key(up)):
                place = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=CART, linewidth=3, zorder=5, clip_on=False))


def _draw_line(points: Points, name: str, best: Mapping[str, Any], paths: Sequence[Path], title: str) -> None:
    """Draw the scores over a single setting; words stand beside each other."""
    values = _values(points, name)
    numbers = all(map(_is_number, values))
    places = {_key(value): value if numbers else place for place, value in enumerate(values)}
    line = sorted((places[_key(settings.get(name))], 100 * score) for settings, score in points)
    with new_figure(7.0, 4.2, paths) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.plot(*zip(*line, strict=True), color=CART, marker="o", linewidth=2.4 if numbers else 0)
        for place, score in line:
            if place == places.get(_key(best.get(name))):
                axes.annotate(
                    f"{score:.1f}", (place, score), (0, 7), textcoords="offset points", ha="center", weight="bold"
                )
        if numbers:
            _scale_axis(axes, values)
        else:
            axes.set_xticks(range(len(values)), [_word(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        axes.margins(y=0.12)
        axes.set_xlabel(_title(name))
        axes.set_ylabel("average score (%)")
        axes.set_title(title, size=10, color=FAINT, loc="left")
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        without_frame(axes)


def _scale_axis(axes: Axes, values: Sequence[float]) -> None:
    """Mark the values that were tried; those that span much lie on a logarithmic axis, with 0 at its left end."""
    positive = [value for value in values if value > 0]
    if min(values) >= 0 and len(positive) > 1 and positive[-1] >= _WIDE * positive[0]:
        if values[0] == 0:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        else:
            axes.set_xscale("log")
    kept, free = [], -math.inf  # in inches from the left: from there on no word stands
    axes.get_xlim()  # settles where values lie
    for value in values:
        place = axes.transData.transform((value, 0))[0] / axes.figure.dpi
        half = 0.05 * len(_word(value)) + 0.03
        if place - half >= free:
            kept.append(value)
            free = place + half
    axes.set_xticks(kept, [_word(value) for value in kept])
    axes.set_xticks([], minor=True)


def _blues(count: int) -> list[Any]:
    """Return colours from pale to dark, for values that have an order."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("blues", ["#8CC4E4", "#0072B2", "#00263D"])
    return [shades(place / max(1, count - 1)) for place in range(count)]


def _known(points: Points) -> list[tuple[Mapping[str, Any], float]]:
    return [(settings, score) for settings, score in points if not math.isnan(number(score))]


def _values(points: Points, name: str) -> list[Any]:
    """Return the different values of a setting: numbers by size, all else as it comes."""
    found = list({_key(settings.get(name)): settings.get(name) for settings, _ in points}.values())
    return sorted(found) if all(map(_is_number, found)) else found


def _key(value: Any) -> str:
    """Return what tells values apart: 1 is 1.0, but not true; lists can be told apart, too."""
    return repr(float(value) if _is_number(value) else value)


def _same(settings: Mapping[str, Any], best: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(_key(settings.get(name)) == _key(best.get(name)) for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{_title(name)} {_word(settings.get(name))}" for name in names)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _word(value: Any) -> str:
    """Write a setting's value as a recipe has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if _is_number(value) else "default" if value is None else str(value)

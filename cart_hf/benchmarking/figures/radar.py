"""The radar plot of normalised scores, as in the CART paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cart_hf.benchmarking.figures.bars import RELATIVE, draw_groups
from cart_hf.errors import UserError
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import (
    FAINT,
    INDIVIDUAL,
    INDIVIDUAL_LINE,
    Style,
    add_legend,
    number,
    styles_of,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.projections.polar import PolarAxes

CIRCLES = 5  # at most, from the centre to 100 %


def radar(normalised: Mapping[str, Mapping[str, float]], paths: Sequence[Path]) -> None:
    """Draw normalised scores: an axis for each task, a closed line for each row; bars when there are 1 or 2 tasks.

    The individual models are the circle at 100 %; the centre lies below the lowest score, as its label says, but not
    below 0, where negative scores are drawn. A line has a gap where its row lacks a task, or has NaN.

    :param normalised: for each row, by the name that the legend shows, its score on each task divided by that of the
        task's individual model. A row called ``individual`` is left out: it is the circle.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :raises UserError: when matplotlib is not installed, or there is nothing to draw.
    """
    rows = {name: scores for name, scores in normalised.items() if name != INDIVIDUAL}
    tasks = list(dict.fromkeys(task for scores in rows.values() for task in scores))
    values = {name: [number(scores.get(task)) for task in tasks] for name, scores in rows.items()}
    if all(math.isnan(value) for row in values.values() for value in row):
        raise UserError("no plot: there is no normalised score to draw")
    with new_figure(8.0, 6.0, paths) as figure:
        if len(tasks) < 3:
            draw_groups(figure, tasks, values)
        else:
            _draw_radar(figure, tasks, values)


def _draw_radar(figure: Figure, tasks: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
    scores = [value for row in values.values() for value in row if not math.isnan(value)]
    ticks = _radial_ticks(min(scores))
    reach = max(1.0, *scores) - ticks[0]
    axes: PolarAxes = figure.add_axes((0.1, 0.1, 0.6, 0.8), projection="polar")  # type: ignore[assignment]
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(ticks[0], ticks[0] + 1.03 * reach)
    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    axes.set_xticks(angles, [""] * len(tasks))
    axes.set_yticks(ticks, [""] * len(ticks))
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines["polar"].set_visible(False)
    for name, style in styles_of(list(values)).items():
        _draw_line(axes, angles, [_not_below(ticks[0], value) for value in values[name]], name, style)
    degrees = [math.radians(i) for i in range(361)]
    axes.plot(degrees, [1.0] * 361, **INDIVIDUAL_LINE, linewidth=1.4, label=f"{INDIVIDUAL} (100 %)", zorder=2.2)
    for tick in ticks:
        _label_circle(axes, math.pi / len(tasks), tick)
    for angle, task in zip(angles, tasks, strict=True):
        _name_axis(axes, angle, ticks[0] + 1.09 * reach, task, size=9 if len(tasks) > 12 else 10)
    add_legend(figure, axes, RELATIVE)


def _radial_ticks(least: float) -> list[float]:
    """Return the radii of the circles: multiples of 5, 10 or 20 % from below the lowest score up to 100 %."""
    for step in (5, 10, 20):
        count = max(1, math.ceil(round(100 * (1 - least) / step + 0.5, 6)))  # none at the centre
        if count <= CIRCLES:
            break
    return [1 - i * step / 100 for i in range(min(count, CIRCLES), -1, -1)]


def _not_below(low: float, value: float) -> float:
    return value if math.isnan(value) else max(value, low)


def _draw_line(axes: PolarAxes, angles: Sequence[float], values: Sequence[float], name: str, style: Style) -> None:
    axes.plot(
        [*angles, angles[0]],
        [*values, values[0]],
        **style.line,
        label=name,
        linewidth=2.8 if style.emphasised else 1.5,
        marker=style.marker,
        markersize=5.5 if style.emphasised else 4,
        zorder=4 if style.emphasised else 3,
        clip_on=False,
    )
    if style.filled and not any(map(math.isnan, values)):
        axes.fill(angles, values, color=style.line["color"], alpha=0.08, zorder=2, linewidth=0)


def _label_circle(axes: PolarAxes, angle: float, radius: float) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    axes.text(
        angle, radius, f"{100 * radius:.0f} %", ha="center", va="center", size=8.5, color=FAINT, zorder=5, bbox=box
    )


def _name_axis(axes: PolarAxes, angle: float, radius: float, task: str, size: float) -> None:
    """Write a task's name beside the end of its axis."""
    right, up = math.sin(angle), math.cos(angle)
    axes.text(
        angle,
        radius,
        wrapped(task, 15),
        size=size,
        linespacing=1.05,
        ha="center" if abs(right) < 0.15 else "left" if right > 0 else "right",
        va="center" if abs(up) < 0.8 else "bottom" if up > 0 else "top",
    )

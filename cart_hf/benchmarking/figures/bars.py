"""Bars of average scores, and of normalised scores where the tasks are too few for a radar plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cart_hf.errors import UserError
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import (
    CART,
    COLOURS,
    FAINT,
    INDIVIDUAL,
    INDIVIDUAL_LINE,
    PRETRAINED_LINE,
    add_legend,
    is_cart,
    number,
    styles_of,
    without_frame,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RELATIVE = "score relative to\nthe task's own model"  # above the legend of normalised scores


def bars(averages: Mapping[str, float], paths: Sequence[Path], reference: Mapping[str, float]) -> None:
    """Draw average scores as horizontal bars, in the order given.

    :param averages: for each row, by the name that is shown, its average score as a fraction; drawn in percent.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param reference: the averages of ``individual`` and ``pretrained``, as far as known: vertical lines.
    :raises UserError: when matplotlib is not installed, or there is nothing to draw.
    """
    values = {name: 100 * number(average) for name, average in averages.items()}
    lines = {name: 100 * average for name, average in reference.items() if not math.isnan(number(average))}
    known = [value for value in (*values.values(), *lines.values()) if not math.isnan(value)]
    if all(map(math.isnan, values.values())):
        raise UserError("no plot: there is no average score to draw")
    with new_figure(8.0, 1.1 + 0.42 * len(values), paths) as figure:
        axes = figure.add_axes((0.24, 0.0, 0.72, 1.0))
        for place, (name, value) in enumerate(values.items()):
            _draw_bar(axes, place, value, cart=is_cart(name))
        _name_bars(axes, list(values))
        _draw_references(axes, lines)
        axes.set_xlim(min(0.0, *known), max(100.0, *known))
        axes.set_xlabel("average score (%)")


def draw_groups(figure: Figure, tasks: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
    """Draw normalised scores as a group of bars for each task.

    :param values: for each row its scores, as fractions, in the order of the tasks; NaN where there is none.
    """
    axes = figure.add_axes((0.1, 0.1, 0.65, 0.8))
    width, size = 0.8 / len(values), 8.5 if len(values) * len(tasks) <= 12 else 7
    for row, (name, style) in enumerate(styles_of(list(values)).items()):
        places = [task - 0.4 + (row + 0.5) * width for task in range(len(tasks))]
        heights = [0.0 if math.isnan(value) else 100 * value for value in values[name]]
        colour = style.line["color"]
        axes.bar(places, heights, 0.9 * width, color=colour, hatch=style.hatch, edgecolor="white", lw=0, label=name)
        for place, height, value in zip(places, heights, values[name], strict=True):
            text = "–" if math.isnan(value) else f"{height:.1f}"
            axes.text(place, max(0.0, height) + 1, text, ha="center", va="bottom", size=size)
    axes.axhline(100, **INDIVIDUAL_LINE, linewidth=1.4, label=f"{INDIVIDUAL} (100 %)", zorder=0.5)
    axes.set_xticks(range(len(tasks)), [wrapped(task, 24) for task in tasks])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("normalised score (%)")
    without_frame(axes)
    add_legend(figure, axes, RELATIVE)


def _draw_bar(axes: Axes, place: int, value: float, *, cart: bool) -> None:
    """Draw a bar with its value: inside its end, where no reference line is in the way, unless it is short."""
    colour, weight = (CART, "bold") if cart else (COLOURS[0], "normal")
    if math.isnan(value):
        axes.text(1, place, "no score", va="center", color=FAINT)
        return
    axes.barh(place, value, height=0.72, color=colour)
    text = f"{value:.1f}"
    if value < 12:
        axes.text(max(value, 0) + 1, place, text, va="center", weight=weight)
    else:
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        axes.text(value - 1, place, text, ha="right", va="center", color="white", weight=weight, bbox=box, zorder=4)


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [wrapped(name, 24) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if is_cart(name) else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    without_frame(axes)


def _draw_references(axes: Axes, lines: Mapping[str, float]) -> None:
    """Draw the lines, each named above: the lowest to the left of its line, the others to the right."""
    for name, value in lines.items():
        style = INDIVIDUAL_LINE if name == INDIVIDUAL else PRETRAINED_LINE
        axes.axvline(value, **style, linewidth=1.6, zorder=3)
        axes.annotate(
            f"{name} {value:.1f}",
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if value == min(lines.values()) else "left",
            va="bottom",
            color=style["color"],
        )

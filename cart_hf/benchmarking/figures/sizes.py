"""Score against size: CART-Indexing as a curve, every other model as a point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cart_hf.errors import UserError
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import (
    CART,
    INDIVIDUAL,
    INDIVIDUAL_LINE,
    is_cart,
    number,
    styles_of,
    without_frame,
    wrapped,
)
from cart_hf.recipe.benchmark import INDEXING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]
"""A model's size and its average score, both relative to the individual models: (1, 1) is theirs."""

_WIDTH, _HEIGHT = 6.6, 4.2  # of the axes, in inches; more height where there are many names
_LINE, _LETTER = 0.19, 0.08  # of text: the distance of two lines, the width of most letters
_ASIDE = 0.4  # between a model and its name


def sizes(
    curve: Mapping[str, Place], paths: Sequence[Path], models: Mapping[str, Place], labels: str = "labels: rank kept"
) -> None:
    """Draw normalised scores against sizes, these on a logarithmic axis.

    :param curve: CART-Indexing's places, by the labels that are written beside them.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param models: the other models' places by name; that of ``individual`` is (1, 1).
    :param labels: what the labels of the curve say.
    :raises UserError: when matplotlib is not installed, or there is nothing to draw.
    """
    line = {label: place for label, place in curve.items() if _is_known(place)}
    others = {name: place for name, place in models.items() if _is_known(place) and name != INDIVIDUAL}
    if not line:
        raise UserError("no plot: no size of CART-Indexing has a score to draw")
    height = max(_HEIGHT, sum(map(_height, others)) + 1.0)
    with new_figure(_WIDTH + 1.4, height + 0.8, paths) as figure:
        axes = figure.add_axes((0.1, 0.14, _WIDTH / (_WIDTH + 1.4), height / (height + 0.8)))
        axes.set_xscale("log")
        _set_limits(axes, [*line.values(), *others.values()], others)
        _draw_individual(axes)
        _draw_curve(axes, line, labels)
        _draw_models(axes, others, height)
        axes.set_xlabel("size of all weights, relative to the individual models'")
        axes.set_ylabel("average normalised score (%)")
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        without_frame(axes)


def _is_known(place: Place) -> bool:
    return not math.isnan(number(place[1])) and place[0] > 0


def _set_limits(axes: Axes, places: Sequence[Place], others: Mapping[str, Place]) -> None:
    """Leave room for names to the left of the smallest model, and mark sizes in steps that look alike."""
    least, most = min(1.0, *(size for size, _ in places)), 1.2 * max(1.0, *(size for size, _ in places))
    names = max((_room(name) for name in others), default=0.0) + _ASIDE
    axes.set_xlim(least / (most / least) ** (names / (_WIDTH - names)), most)
    factors = (1, 2, 3, 5, 7) if most / least < 15 else (1, 2, 5)
    steps = [factor * 10.0**power for power in range(-4, 3) for factor in factors]
    ticks = [step for step in steps if 0.7 * least <= step <= most]
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.set_xticks([], minor=True)
    lowest, highest = min(1.0, *(score for _, score in places)), max(1.0, *(score for _, score in places))
    span = max(highest - lowest, 0.02)
    axes.set_ylim(100 * (lowest - 0.08 * span), 100 * (highest + 0.1 * span))


def _room(name: str) -> float:
    """Return the width of a name."""
    return _LETTER * (1.15 if is_cart(name) else 1) * max(map(len, wrapped(name, 24).split("\n")))


def _height(name: str) -> float:
    return _LINE * len(wrapped(name, 24).split("\n"))


def _draw_individual(axes: Axes) -> None:
    colour = INDIVIDUAL_LINE["color"]
    axes.axhline(100, **INDIVIDUAL_LINE, linewidth=1.2, zorder=2)
    axes.axvline(1, **INDIVIDUAL_LINE, linewidth=1.2, zorder=2)
    axes.plot([1], [100], marker="D", markersize=7, color=colour, zorder=6)
    axes.annotate(
        "individual models", (1, 100), xytext=(-6, 7), textcoords="offset points", ha="right", va="bottom", color=colour
    )


def _draw_curve(axes: Axes, curve: Mapping[str, Place], labels: str) -> None:
    """Draw CART-Indexing by growing size, each point labelled, and say below its middle what it is."""
    places = sorted(curve.values())
    xs, ys = [size for size, _ in places], [100 * score for _, score in places]
    axes.plot(xs, ys, color=CART, linewidth=2.8, marker="o", markersize=6.5, zorder=5)
    for label, (size, score) in curve.items():
        axes.annotate(
            label,
            (size, 100 * score),
            xytext=(5, -6),
            textcoords="offset points",
            ha="left",
            va="top",
            size=9,
            color=CART,
            zorder=7,
        )
    middle = (len(places) - 1) // 2
    for text, weight, down in (
        (INDEXING, "bold", 42),
        (f"one centre, and an\nadapter for each task\n({labels})", "normal", 59),
    ):
        axes.annotate(
            text,
            (xs[middle], ys[middle]),
            xytext=(40, -down),
            textcoords="offset points",
            ha="left",
            va="top",
            color=CART,
            weight=weight,
            linespacing=1.35,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            zorder=3,
        )


def _draw_models(axes: Axes, models: Mapping[str, Place], height: float) -> None:
    """Draw the other models, each joined to its name, which is to the left of all of them."""
    bottom, top = axes.get_ylim()
    inches = {name: height * (100 * score - bottom) / (top - bottom) for name, (_, score) in models.items()}
    heights = _apart(inches, height)
    left = min((size for size, _ in models.values()), default=1.0)
    low, high = axes.get_xlim()
    left /= (high / low) ** (_ASIDE / _WIDTH)
    for name, style in styles_of(list(models)).items():
        (size, score), colour = models[name], style.line["color"]
        emphasised = is_cart(name)
        axes.plot([size], [100 * score], marker=style.marker, markersize=9 if emphasised else 7, color=colour, zorder=6)
        axes.annotate(
            wrapped(name, 24),
            (size, 100 * score),
            xytext=(left, bottom + (top - bottom) * heights[name] / height),
            textcoords="data",
            ha="right",
            va="center",
            color=colour,
            weight="bold" if emphasised else "normal",
            linespacing=1.0,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (1, 0.5),
            },
            zorder=4,
        )


def _apart(wanted: Mapping[str, float], height: float) -> dict[str, float]:
    """Move names up or down until none lies on another; they keep their order, and stay within the axes.

    :param wanted: in inches above the bottom.
    :param height: of the axes, enough for all.
    """
    from_below = sorted(wanted, key=lambda name: wanted[name])
    found: dict[str, float] = {}
    edge = 0.0
    for name in from_below:
        found[name] = max(wanted[name], edge + _height(name) / 2)
        edge = found[name] + _height(name) / 2
    edge = height
    for name in reversed(from_below):
        found[name] = min(found[name], edge - _height(name) / 2)
        edge = found[name] - _height(name) / 2
    return found

"""What a rank costs and what it saves: interference I(k) and reconstruction error R(k), as in the CART paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cart_hf.analysis.figures.common import LINES, NORMALIZERS, RATIO, TITLES, mark_recipe, three_digits
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import COLOURS, add_legend, without_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _GAP = 3.9, 3.4, 0.35  # of a panel, and between two, in inches
_NAMED = 0.64  # of the largest rank ratio: where a curve's name is written
_ERROR: dict[str, Any] = {"color": COLOURS[1], "linestyle": "-.", "linewidth": 2.4}


class Curve(NamedTuple):
    """What was measured around one centre, at each rank ratio.

    :param reconstruction: ``R(k) / R(0)``, the mean over matrices.
    :param interference: ``I(k)``, the mean over matrices.
    :param layers: the same of each layer.
    """

    reconstruction: Sequence[float]
    interference: Sequence[float]
    layers: Sequence[Sequence[float]]


def reconstruction_interference(
    centres: Mapping[str, Curve], ratios: Sequence[float], paths: Sequence[Path], normalizer: str, recipe: float | None
) -> None:
    """Draw a panel for each centre: the error falls to the left, interference rises to the right; both axes are shared.

    The values at the recipe's rank ratio are marked and written.

    :param centres: by ``average`` and ``base``.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param normalizer: what I(k) divides by: ``all``, ``top`` or ``none``.
    :param recipe: the rank ratio that the recipe keeps.
    :raises UserError: when matplotlib is not installed.
    """
    import numpy

    most = float(numpy.nanmax([curve.interference for curve in centres.values()])) or 1.0
    width = len(centres) * (_WIDTH + _GAP) - _GAP
    with new_figure(width, _HEIGHT, paths) as figure:
        for place, (centre, curve) in enumerate(centres.items()):
            axes = figure.add_axes((place * (_WIDTH + _GAP) / width, 0, _WIDTH / width, 1))
            right = axes.twinx()
            axes.plot(ratios, curve.reconstruction, **_ERROR)
            right.plot(ratios, curve.interference, **LINES[centre])
            _name(axes, "R(k)", ratios, curve.reconstruction, _ERROR["color"])
            _name(right, "I(k)", ratios, curve.interference, LINES[centre]["color"])
            axes.set_ylim(0, 1.04)
            right.set_ylim(0, 1.04 * most)
            axes.set_xlim(-0.01 * ratios[-1], 1.01 * ratios[-1])
            axes.set_xlabel(RATIO)
            axes.set_title(TITLES[centre], size=11, pad=20)
            mark_recipe(axes, recipe)
            if recipe is not None:
                _mark(axes, recipe, ratios, curve.reconstruction, _ERROR["color"], above=True)
                _mark(right, recipe, ratios, curve.interference, LINES[centre]["color"])
            axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
            first, last = place == 0, place == len(centres) - 1
            for side in (axes, right):
                side.spines["top"].set_visible(False)
                side.spines["left"].set_visible(first)
                side.spines["right"].set_visible(last)
            axes.tick_params(axis="y", left=first, labelleft=first, colors=_ERROR["color"])
            right.tick_params(axis="y", right=last, labelright=last)
            if first:
                axes.set_ylabel("reconstruction error R(k) / R(0)", color=_ERROR["color"])
            if last:
                right.set_ylabel(f"interference I(k)\n{NORMALIZERS[normalizer]}")


def interference(
    centres: Mapping[str, Curve], ratios: Sequence[float], paths: Sequence[Path], normalizer: str, recipe: float | None
) -> None:
    """Draw the interference around each centre, faintly that of each layer.

    :param centres, ratios, paths, normalizer, recipe: see :func:`reconstruction_interference`.
    :raises UserError: when matplotlib is not installed.
    """
    with new_figure(6.4, 4.2, paths) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        for centre, curve in centres.items():
            line, title = LINES[centre], TITLES[centre].partition(":")[0]
            axes.plot(ratios, curve.interference, **line, label=title, zorder=3)
            for place, layer in enumerate(curve.layers):
                label = f"{title}, each layer" if place == 0 else None
                axes.plot(ratios, layer, color=line["color"], linewidth=0.7, alpha=0.35, zorder=2, label=label)
            if recipe is not None:
                _mark(axes, recipe, ratios, curve.interference, line["color"])
        mark_recipe(axes, recipe)
        axes.set_xlim(-0.01 * ratios[-1], 1.01 * ratios[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(RATIO)
        axes.set_ylabel(f"interference I(k), {NORMALIZERS[normalizer]}")
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        without_frame(axes)
        add_legend(figure, axes)


def _name(axes: Axes, name: str, ratios: Sequence[float], values: Sequence[float], colour: str) -> None:
    """Write above a curve, where the others seldom are, what it is."""
    ratio = _NAMED * ratios[-1]
    place = (ratio, _at(ratio, ratios, values))
    if not math.isnan(place[1]):
        axes.annotate(name, place, (0, 6), textcoords="offset points", color=colour, ha="center", va="bottom")


def _mark(
    axes: Axes, ratio: float, ratios: Sequence[float], values: Sequence[float], colour: str, *, above: bool = False
) -> None:
    """Mark a curve at a rank ratio, and write its value there, to the right.

    :param above: whether it stands above the curve: a falling one's does.
    """
    value = _at(ratio, ratios, values)
    if math.isnan(value):
        return
    axes.plot([ratio], [value], marker="o", color=colour, markersize=7, zorder=5)
    axes.annotate(
        three_digits(value),
        (ratio, value),
        (8, 2 if above else -4),
        textcoords="offset points",
        color=colour,
        weight="bold",
        va="bottom" if above else "top",
        zorder=6,
    )


def _at(ratio: float, ratios: Sequence[float], values: Sequence[float]) -> float:
    """Return a curve's value between the ratios that were sampled."""
    import numpy

    return float(numpy.interp(ratio, ratios, values, left=math.nan, right=math.nan))

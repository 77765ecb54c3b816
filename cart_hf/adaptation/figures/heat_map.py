"""The learnt coefficients: a row for each task, a column for each tensor or layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.errors import UserError
from cart_hf.figures.blocks import blocks_of, in_order
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.cells import WRITTEN, add_scale, diverging, hatch, name_rows, two_digits, write_values
from cart_hf.figures.columns import name_columns, number_layers, part_blocks
from cart_hf.figures.style import FAINT, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_WIDTH, _COLUMN, _ROW = 9.0, 0.56, 0.34  # inches: at most of all columns, at most of one, of a row


def heat_map(coefficients: Mapping[str, Mapping[str, float]], paths: Sequence[Path], *, initial: float | None) -> None:
    """Draw coefficients as colours.

    Layers are numbered above; below, what lies outside the layers is named, and every column where they are few.

    :param coefficients: for each tensor (or layer, or group) the coefficient of each task, in the order that is drawn,
        but layers go by their numbers; a task that lacks a tensor has none there (or NaN), and a hatched cell.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param initial: the coefficient before anything was learnt, the middle of the colours; None: there is not one.
    :raises UserError: when matplotlib is not installed, or there is nothing to draw.
    """
    tasks = list(dict.fromkeys(task for column in coefficients.values() for task in column))
    names = in_order(list(coefficients))
    rows = [[number(coefficients[name].get(task)) for name in names] for task in tasks]
    if all(math.isnan(value) for row in rows for value in row):
        raise UserError("no plot: there is no coefficient to draw")
    width, height = min(_WIDTH, _COLUMN * len(names)), _ROW * len(tasks)
    column = width / len(names)
    with new_figure(width, height, paths) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        hatch(axes)
        image, beyond = _draw_cells(axes, rows, initial)
        if column >= WRITTEN:
            write_values(axes, image, rows, two_digits)
        name_rows(axes, tasks)
        _write_means(axes, rows)
        blocks = blocks_of(names)
        part_blocks(axes, blocks, column)
        number_layers(axes, blocks, column)
        name_columns(axes, blocks, column)
        label = "λ" if initial is None else f"λ (before: {initial:g})"
        add_scale(figure, axes, image, label, beyond=beyond, mark=initial)


def _draw_cells(axes: Axes, rows: Sequence[Sequence[float]], initial: float | None) -> tuple[AxesImage, str]:
    """Draw the cells; return them, and at which ends there are values that the colours do not reach."""
    import numpy

    values = numpy.ma.masked_invalid(rows)
    known = values.compressed()
    middle = float(numpy.median(known)) if initial is None else initial
    reach = _reach(sorted(abs(known - middle).tolist()))
    low, high = middle - reach, middle + reach
    if initial is None:
        low, high = max(low, float(known.min()) - 0.005), min(high, float(known.max()) + 0.005)
        colours: Any = "cividis"
    else:
        colours = diverging()
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    below, above = bool(known.min() < low), bool(known.max() > high)
    return image, "both" if below and above else "min" if below else "max" if above else "neither"


def _reach(distances: Sequence[float]) -> float:
    """Return how far from the middle the colours reach: not to the last hundredth where that lies far out.

    :param distances: of all values, in order.
    """
    most, usual = distances[-1], distances[math.ceil(0.99 * len(distances)) - 1]
    return max(usual if most > 1.5 * usual else most, 0.01)


def _write_means(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    """Write the means of the tasks' coefficients to the right."""
    if len(rows[0]) == 1:
        return
    side: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "va": "center",
        "color": FAINT,
        "size": 9,
    }
    for row, values in enumerate(rows):
        known = [value for value in values if not math.isnan(value)]
        if known:
            axes.annotate(two_digits(sum(known) / len(known)), (1, row), (6, 0), **side)
    axes.annotate("mean", (1, -0.5), (6, 7), **side)

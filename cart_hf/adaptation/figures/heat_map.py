"""The learnt coefficients: a row for each task, a column for each tensor or layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.adaptation.figures.blocks import Block, blocks_of, in_order, stretches
from cart_hf.errors import UserError
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import CART, COLOURS, FAINT, number, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_WIDTH, _COLUMN, _ROW = 9.0, 0.56, 0.34  # inches: at most of all columns, at most of one, of a row
_WRITTEN = 0.5  # the least width of a column for the number in each of its cells
_LINE, _LETTER = 0.15, 0.075  # of small text: the distance of two lines, the width of most letters
_NAMED = 48  # at most so many columns have each its own name


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
        axes = figure.add_axes((0, 0, 1, 1), facecolor="white")
        axes.patch.set(hatch="////", edgecolor="#CFCFCF", linewidth=0)
        image, beyond = _draw_cells(axes, rows, initial)
        if column >= _WRITTEN:
            _write_values(axes, image, rows)
        _name_rows(axes, tasks, rows)
        blocks = blocks_of(names)
        _part_blocks(axes, blocks, column)
        _number_layers(axes, blocks, column)
        _name_columns(axes, blocks, column)
        _draw_scale(figure, axes, image, initial, beyond)


def _draw_cells(axes: Axes, rows: Sequence[Sequence[float]], initial: float | None) -> tuple[AxesImage, str]:
    """Draw the cells; return them, and at which ends there are values that the colours do not reach."""
    import numpy
    from matplotlib.colors import LinearSegmentedColormap

    values = numpy.ma.masked_invalid(rows)
    known = values.compressed()
    middle = float(numpy.median(known)) if initial is None else initial
    reach = _reach(sorted(abs(known - middle).tolist()))
    low, high = middle - reach, middle + reach
    if initial is None:
        low, high = max(low, float(known.min()) - 0.005), min(high, float(known.max()) + 0.005)
        colours: Any = "cividis"
    else:
        colours = LinearSegmentedColormap.from_list("ours", ["#00466F", COLOURS[0], "#F4F4F4", CART, "#7E3700"])
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    below, above = bool(known.min() < low), bool(known.max() > high)
    return image, "both" if below and above else "min" if below else "max" if above else "neither"


def _reach(distances: Sequence[float]) -> float:
    """Return how far from the middle the colours reach: not to the last hundredth where that lies far out.

    :param distances: of all values, in order.
    """
    most, usual = distances[-1], distances[math.ceil(0.99 * len(distances)) - 1]
    return max(usual if most > 1.5 * usual else most, 0.01)


def _write_values(axes: Axes, image: AxesImage, rows: Sequence[Sequence[float]]) -> None:
    import numpy

    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.to_rgba(numpy.array([value]))[0]
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                column, row, _two(value), ha="center", va="center", size=8.5, color="#222222" if light else "white"
            )


def _two(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no minus before 0


def _name_rows(axes: Axes, tasks: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Write the tasks to the left, and the means of their coefficients to the right."""
    axes.set_yticks(range(len(tasks)), [wrapped(task, 24) for task in tasks])
    axes.set_yticks([row + 0.5 for row in range(len(tasks) - 1)], minor=True)
    axes.grid(axis="y", which="minor", color="white", linewidth=1.5)
    axes.tick_params(axis="both", which="both", length=0)
    axes.spines[:].set_visible(False)
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
            axes.annotate(_two(sum(known) / len(known)), (1, row), (6, 0), **side)
    axes.annotate("mean", (1, -0.5), (6, 7), **side)


def _part_blocks(axes: Axes, blocks: Sequence[Block], column: float) -> None:
    """Draw lines between blocks, unless each is a column or they are narrow, and thicker ones around lists of layers.

    :param column: its width in inches.
    """
    around = {place for _, start, end in stretches(blocks) for place in (start, end)}
    for before, block in pairwise(blocks):
        least = min(len(before.names), len(block.names))
        if block.start in around:
            axes.axvline(block.start - 0.5, color="#222222", linewidth=1.2)
        elif max(len(block.names) for block in blocks) > 1 and least * column >= 0.07:
            axes.axvline(block.start - 0.5, color="#222222", linewidth=0.4)


def _number_layers(axes: Axes, blocks: Sequence[Block], column: float) -> None:
    """Write above each layer its number, and above all layers of a list its path.

    :param column: its width in inches.
    """
    above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    for path, start, end in stretches(blocks):
        layers = [block for block in blocks if start <= block.start < end]
        width = column * (end - start)
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * width / len(layers) >= 0.2 or step == 100)
        for layer in layers[::step]:
            middle = (layer.start + layer.end - 1) / 2
            axes.annotate(str(layer.number), (middle, 1), (0, 3), **above, va="bottom", size=8.5, color=FAINT)
        line = {"arrowstyle": "-", "linewidth": 0.8, "color": FAINT, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (start - 0.4, 1), (end - 0.6, 1), xycoords=_raised(axes, 16), arrowprops=line)
        title = path if _LETTER * len(path) <= width else path.replace(".", ".\n")
        axes.annotate(title, ((start + end - 1) / 2, 1), (0, 19), **above, va="bottom", size=9, linespacing=1.0)


def _raised(axes: Axes, points: float) -> Any:
    """Return coordinates like data to the right, and like the axes' height, but higher by some points."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    figure = axes.figure
    up = ScaledTranslation(0, points / 72, figure.dpi_scale_trans)
    return blended_transform_factory(axes.transData, axes.transAxes) + up


def _name_columns(axes: Axes, blocks: Sequence[Block], column: float) -> None:
    """Write below what the columns are: each where they are few, else the blocks outside the layers.

    :param column: its width in inches.
    """
    count = blocks[-1].end
    if count <= _NAMED:
        outside = {block: "" if block.number is not None else block.path for block in blocks}
        labels = [
            (float(block.start + place), ".".join(filter(None, (outside[block], name))))
            for block in blocks
            for place, name in enumerate(block.names)
        ]
    else:
        labels = _apart([block for block in blocks if block.number is None], count, column)
    upright = count > 1 and any(_LETTER * len(label) > column for _, label in labels)
    axes.set_xticks(*zip(*labels, strict=True) if labels else ([],), rotation=90 if upright else 0, size=8.5)
    axes.set_xlim(-0.5, count - 0.5)


def _apart(blocks: Sequence[Block], count: int, column: float) -> list[tuple[float, str]]:
    """Return the names of narrow blocks and where they stand: a little to the right where one is there, else left out.

    :param count: of all columns.
    :param column: its width in inches.
    """
    found: list[tuple[float, str]] = []
    free = 0.0  # in inches from the left: from there on no name stands
    for block in blocks:
        middle = column * (block.start + block.end) / 2
        place = max(middle, free + _LINE / 2)
        if place - middle <= 0.6 * _LINE and place <= column * count:
            found.append((place / column - 0.5, block.path))
            free = place + _LINE / 2
    return found


def _draw_scale(figure: Figure, axes: Axes, image: AxesImage, initial: float | None, beyond: str) -> None:
    """Draw what the colours mean, to the right of all that is drawn so far."""
    from matplotlib.ticker import MaxNLocator

    box = axes.get_tightbbox()
    assert box is not None
    width, height = figure.get_size_inches()
    tall = min(max(height, 1.1), 2.8) / height
    scale = figure.add_axes((box.x1 / figure.bbox.width + 0.2 / width, 1 - tall, 0.13 / width, tall))
    bar = figure.colorbar(image, cax=scale, extend=beyond, extendfrac=0.06, ticks=MaxNLocator(5))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=9, length=3)
    if initial is not None:
        bar.ax.axhline(initial, color="#222222", linewidth=1.2)
    bar.set_label("λ" if initial is None else f"λ (before: {initial:g})")

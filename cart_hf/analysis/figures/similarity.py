"""How alike the models' task vectors are: each with each, centred and not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.analysis.figures.common import TITLES, shortened
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.cells import add_scale, diverging, hatch, two_digits, write_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Rows = Sequence[Sequence[float]]

_COLUMNS = {
    "cosine": "cosine",
    "overlap": "overlap of row spaces",
    "pairs": "interference of each pair",
}
_GAP, _BETWEEN = 1.15, 0.55  # inches: between columns, for the colours' scale; between rows
_FEW = 10  # models: of more, cells are too small for numbers


def similarity(centres: Mapping[str, Mapping[str, Rows]], names: Sequence[str], paths: Sequence[Path]) -> None:
    """Draw a row of maps for each centre; the maps below each other have the same colours.

    What a model shares with itself says nothing, and stays grey.

    :param centres: by ``average`` and ``base``: ``cosine``, ``overlap`` and ``pairs``, each of shape (T, T).
    :param names: the models.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :raises UserError: when matplotlib is not installed.
    """
    side = max(1.9, (0.42 if len(names) <= _FEW else 0.2) * len(names))
    width = len(_COLUMNS) * (side + _GAP) - _GAP
    height = len(centres) * (side + _BETWEEN) - _BETWEEN
    with new_figure(width, height, paths) as figure:
        for column, (key, title) in enumerate(_COLUMNS.items()):
            maps = {centre: _without_diagonal(rows[key]) for centre, rows in centres.items()}
            low, high = _limits(maps.values(), both_sides=key == "cosine")
            for row, (centre, values) in enumerate(maps.items()):
                bottom = height - side - row * (side + _BETWEEN)
                axes = figure.add_axes((column * (side + _GAP) / width, bottom / height, side / width, side / height))
                image = _draw(axes, values, low, high, key == "cosine")
                _name(axes, names, left=column == 0, below=row == len(maps) - 1)
                if row == 0:
                    axes.set_title(title, size=11, pad=8)
                if column == 0:
                    axes.set_ylabel(TITLES[centre].partition(":")[0], size=11, labelpad=8)
                _scale(figure, axes, image)


def _draw(axes: Axes, values: Rows, low: float, high: float, both_sides: bool) -> AxesImage:
    import numpy
    from matplotlib.patches import Rectangle

    hatch(axes)
    image = axes.imshow(
        numpy.ma.masked_invalid(values),
        cmap=diverging() if both_sides else "cividis",
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    for place in range(len(values)):
        axes.add_patch(Rectangle((place - 0.5, place - 0.5), 1, 1, facecolor="#DADADA", edgecolor="none"))
    if len(values) <= _FEW:
        write_values(axes, image, values, two_digits, size=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _without_diagonal(rows: Rows) -> list[list[float]]:
    return [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(rows)]


def _limits(maps: Any, *, both_sides: bool) -> tuple[float, float]:
    """Return where the colours end: as far below 0 as above it, or from 0 on."""
    most = max((abs(v) for rows in maps for row in rows for v in row if not math.isnan(v)), default=0.0) or 1.0
    return (-most if both_sides else 0.0), most


def _name(axes: Axes, names: Sequence[str], *, left: bool, below: bool) -> None:
    words, places = [shortened(name) for name in names], range(len(names))
    size = 9 if len(names) <= _FEW else 8
    axes.set_yticks(places, words if left else [""] * len(names), size=size)
    axes.set_xticks(places, words if below else [""] * len(names), rotation=90, size=size)


def _scale(figure: Figure, axes: Axes, image: AxesImage) -> None:
    add_scale(figure, axes, image, "")

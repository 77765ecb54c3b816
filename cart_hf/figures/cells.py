"""The cells of a heat map: hatched where there is nothing, numbers in them, and what their colours mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.figures.style import CART, COLOURS, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

WRITTEN = 0.5  # inches: the least width of a column for the number in each of its cells


def diverging() -> Colormap:
    """Return colours on both sides of a middle."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ours", ["#00466F", COLOURS[0], "#F4F4F4", CART, "#7E3700"])


def hatch(axes: Axes) -> None:
    """Hatch the background, which is seen where there is no cell."""
    axes.patch.set(facecolor="white", hatch="////", edgecolor="#CFCFCF", linewidth=0)


def write_values(
    axes: Axes, image: AxesImage, rows: Sequence[Sequence[float]], text: Callable[[float], str], size: float = 8.5
) -> None:
    """Write numbers into their cells, dark on light colours, light on dark ones.

    :param rows: the numbers; NaN where there is no cell.
    :param text: returns how a number is written.
    """
    import numpy

    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.to_rgba(numpy.array([value]))[0]
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                column, row, text(value), ha="center", va="center", size=size, color="#222222" if light else "white"
            )


def two_digits(value: float) -> str:
    """Write a number with two digits after the point."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no minus before 0


def name_rows(axes: Axes, names: Sequence[str], width: int = 24) -> None:
    """Write names to the left of the rows, which white lines part.

    :param width: names of more characters are broken.
    """
    axes.set_yticks(range(len(names)), [wrapped(name, width) for name in names])
    axes.set_yticks([row + 0.5 for row in range(len(names) - 1)], minor=True)
    axes.grid(axis="y", which="minor", color="white", linewidth=1.5)
    axes.tick_params(axis="both", which="both", length=0)
    axes.spines[:].set_visible(False)


def add_scale(
    figure: Figure,
    axes: Axes,
    image: AxesImage,
    label: str,
    *,
    beyond: str = "neither",
    mark: float | None = None,
    **ticks: Any,
) -> None:
    """Draw what the colours mean, to the right of all that is drawn in the axes so far.

    :param label: what the numbers are.
    :param beyond: where values are that the colours do not reach: ``neither``, ``min``, ``max``, ``both`` ends.
    :param mark: a value that a line marks.
    :param ticks: how the numbers are written, such as ``format``.
    """
    from matplotlib.ticker import MaxNLocator

    box, place = axes.get_tightbbox(), axes.get_position()
    assert box is not None
    width, height = figure.get_size_inches()
    tall = min(max(place.height * height, 1.1), 2.8) / height
    scale = figure.add_axes((box.x1 / figure.bbox.width + 0.2 / width, place.y1 - tall, 0.13 / width, tall))
    bar = figure.colorbar(image, cax=scale, extend=beyond, extendfrac=0.06, ticks=MaxNLocator(5), **ticks)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=9, length=3)
    if mark is not None:
        bar.ax.axhline(mark, color="#222222", linewidth=1.2)
    bar.set_label(label)

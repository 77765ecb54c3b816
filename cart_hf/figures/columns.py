"""What the columns of a heat map are: tensors or blocks of a model, its layers numbered above, all else named below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cart_hf.figures.blocks import Block, stretches
from cart_hf.figures.style import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE, _LETTER = 0.15, 0.075  # of small text: the distance of two lines, the width of most letters
_NAMED = 48  # at most so many columns have each its own name


def part_blocks(axes: Axes, blocks: Sequence[Block], column: float) -> None:
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


def number_layers(axes: Axes, blocks: Sequence[Block], column: float) -> None:
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


def name_columns(axes: Axes, blocks: Sequence[Block], column: float) -> None:
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

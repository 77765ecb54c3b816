"""Which layers carry which task, how far they moved, and what of it is left in the merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cart_hf.analysis.figures.common import LONGEST, shortened
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.cells import add_scale, hatch, name_rows
from cart_hf.figures.columns import name_columns, number_layers, part_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from cart_hf.figures.blocks import Block

_WIDTH, _COLUMN = 8.0, 0.5  # inches: at most of all columns, at most of one
_FEW = 10  # models: rows of more are narrower
_PITCH = 1.5  # inches: least distance of the tops of two panels, for the colours' scale
_TITLE = 0.42  # inches: between two panels


class Panel(NamedTuple):
    """A map of tasks and blocks.

    :param title: what its numbers are.
    :param names: of the rows.
    :param rows: a number for each block; NaN where there is none.
    :param whole: a value that the colours reach in any case, and that is marked.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[float]]
    whole: float | None = None


def layers(panels: Sequence[Panel], blocks: Sequence[Block], paths: Sequence[Path]) -> None:
    """Draw panels below each other; layers are numbered above, what lies outside the layers is named below.

    :param blocks: the columns.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :raises UserError: when matplotlib is not installed.
    """
    width = min(_WIDTH, _COLUMN * len(blocks))
    row = 0.3 if max(len(panel.names) for panel in panels) <= _FEW else 0.19
    heights = [row * len(panel.names) for panel in panels]
    tops = [0.0]
    for height in heights:
        tops.append(tops[-1] + max(height + _TITLE, _PITCH))
    whole = tops[-2] + heights[-1]
    with new_figure(width, whole, paths) as figure:
        for panel, top, height in zip(panels, tops[:-1], heights, strict=True):
            axes = figure.add_axes((0, 1 - (top + height) / whole, 1, height / whole))
            image = _draw(axes, panel)
            name_rows(axes, [shortened(name) for name in panel.names], LONGEST)
            axes.tick_params(axis="y", labelsize=10 if row > 0.2 else 8)
            part_blocks(axes, blocks, width / len(blocks))
            axes.set_xticks([])
            if top == 0:
                number_layers(axes, blocks, width / len(blocks))
            if panel is panels[-1]:
                name_columns(axes, blocks, width / len(blocks))
            add_scale(figure, axes, image, "", mark=panel.whole)
            _title(axes, panel.title)


def _title(axes: Axes, title: str) -> None:
    """Write a title above all that is drawn so far."""
    box = axes.get_tightbbox()
    assert box is not None
    above = 72 * (box.y1 - axes.bbox.y1) / axes.figure.dpi
    axes.set_title(title, size=11, loc="left", pad=above + 9)


def _draw(axes: Axes, panel: Panel) -> AxesImage:
    import numpy

    values = numpy.ma.masked_invalid(panel.rows)
    known = values.compressed().tolist()
    low, high = min(0.0, *known, 0.0), max(0.0, *known, panel.whole or 0.0) or 1.0
    hatch(axes)
    return axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")

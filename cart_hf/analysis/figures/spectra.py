"""The singular values of each model's task vectors, centred and not, as in the CART paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cart_hf.analysis.figures.common import RATIO, TITLES, mark_recipe, shortened
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import add_legend, line_of, without_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _GAP = 4.0, 0.3  # of a panel, and between two, in inches
_LEAST = 1e-4  # of the largest: what is less is rounding

Spectra = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Fractions of the rank, and each model's normalised singular values there."""


def spectra(centres: Mapping[str, Spectra], names: Sequence[str], paths: Sequence[Path], recipe: float | None) -> None:
    """Draw a panel for each centre, a line for each model, on a logarithmic axis that the panels share.

    :param centres: by ``average`` and ``base``.
    :param names: the models.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param recipe: the rank ratio that the recipe keeps.
    :raises UserError: when matplotlib is not installed.
    """
    known = [value for _, rows in centres.values() for row in rows for value in row if value > 0]
    least = max(min(known), _LEAST * max(known)) if known else _LEAST
    width, height = len(centres) * (_WIDTH + _GAP) - _GAP, max(3.6, 0.25 * len(names) + 0.3)
    with new_figure(width, height, paths) as figure:
        from matplotlib.ticker import LogLocator

        axes: Axes | None = None
        for place, (centre, (at, rows)) in enumerate(centres.items()):
            left = place * (_WIDTH + _GAP) / width
            axes = figure.add_axes((left, 0, _WIDTH / width, 1), sharey=axes)
            for i, (name, row) in enumerate(zip(names, rows, strict=True)):
                values = [value if value >= least else math.nan for value in row]
                axes.plot(at, values, **line_of(i), linewidth=1.6, label=shortened(name))
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
            axes.minorticks_off()
            axes.set_xlim(-0.01 * at[-1], 1.01 * at[-1])
            axes.set_xlabel(RATIO)
            axes.set_title(TITLES[centre], size=11, pad=20)
            mark_recipe(axes, recipe)
            axes.grid(color="#E4E4E4", linewidth=0.8)
            without_frame(axes)
            if place:
                axes.tick_params(axis="y", which="both", labelleft=False)
            else:
                axes.set_ylabel("singular value / norm, mean over matrices")
        if axes is not None:
            add_legend(figure, axes)

"""How figures look: colours, lines, names and the legend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INDIVIDUAL, PRETRAINED = "individual", "pretrained"
INDIVIDUAL_LINE: dict[str, Any] = {"color": "#222222", "linestyle": (0, (4, 2))}
PRETRAINED_LINE: dict[str, Any] = {"color": "#7A7A7A", "linestyle": (0, (1, 1.2))}
FAINT = "#555555"
# Okabe and Ito's palette, which colour-blind readers can tell apart; vermilion is kept for CART, and yellow, too pale
# for a line, gives way to brown. Line styles, markers and hatches repeat the difference for prints without colour.
CART = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7B5B2E", "#3D3D8F")
_DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("s", "^", "v", "P", "X", "<", ">")
_HATCHES = ("", "//", "xx", "..")


class Style(NamedTuple):
    """How a row is drawn.

    :param line: colour and line style.
    :param marker: at each task, on a line.
    :param hatch: inside a bar: rows of one colour differ by it.
    :param emphasised: thicker than others.
    :param filled: whether the inside of its line is tinted.
    """

    line: dict[str, Any]
    marker: str
    hatch: str = ""
    emphasised: bool = False
    filled: bool = False


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """Choose how each row is drawn, in the order of the rows."""
    styles: dict[str, Style] = {}
    ours = others = 0
    for name in names:
        if is_cart(name):
            line = {"color": CART, "linestyle": _DASHES[ours % len(_DASHES)]}
            styles[name] = Style(line, "o", _HATCHES[ours % len(_HATCHES)], emphasised=True, filled=ours == 0)
            ours += 1
        elif name == PRETRAINED:
            styles[name] = Style(PRETRAINED_LINE, "d")
        else:
            styles[name] = Style(line_of(others), _MARKERS[others % len(_MARKERS)])
            others += 1
    return styles


def line_of(place: int) -> dict[str, Any]:
    """Return colour and line style of the line at a place: no two of the first 35 are alike."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place % len(_DASHES)]}


def is_cart(name: str) -> bool:
    """Whether a row is emphasised: CART and its variants are."""
    return name.lower().startswith("cart")


def number(score: float | None) -> float:
    """Return a score, or NaN where there is none."""
    return score if score is not None and math.isfinite(score) else math.nan


def wrapped(name: str, width: int) -> str:
    """Break a name after spaces, underscores and hyphens, into lines of about ``width`` characters."""
    lines = [""]
    for piece in name.replace("_", "_\0").replace("-", "-\0").replace(" ", " \0").split("\0"):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 2 * width))


def without_frame(axes: Axes) -> None:
    """Leave out the lines above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """Put the legend to the right of all that is drawn so far.

    :param title: what it says above the names.
    """
    box = axes.get_tightbbox()
    assert box is not None
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="center left",
        bbox_to_anchor=(box.x1 / figure.bbox.width + 0.02, 0.5),
        frameon=False,
        handlelength=3,
        labelspacing=0.7,
        title=title,
        alignment="left",
    )
    legend.get_title().set_color(FAINT)

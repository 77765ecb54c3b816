"""What an analysis's figures share: the two centres, the recipe's rank, and names that are not too long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cart_hf.figures.style import CART, COLOURS, FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIO = "rank ratio k / r"
TITLES = {"average": "centred: from the models' average", "base": "uncentred: from the base"}
LINES: dict[str, dict[str, Any]] = {
    "average": {"color": CART, "linestyle": "-", "linewidth": 2.8},
    "base": {"color": COLOURS[0], "linestyle": (0, (5, 1.5)), "linewidth": 2.4},
}
NORMALIZERS = {
    "all": "normalised by all singular values",
    "top": "normalised by the top k singular values",
    "none": "not normalised",
}
LONGEST = 30


def shortened(name: str) -> str:
    """Leave out the middle of a long name."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def three_digits(value: float) -> str:
    """Write a number that is not negative with about three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def mark_recipe(axes: Axes, ratio: float | None) -> None:
    """Mark the rank ratio that the recipe keeps, and write it above the axes."""
    if ratio is not None:
        axes.axvline(ratio, color=FAINT, linewidth=1.2, linestyle=(0, (1, 1.2)), zorder=1.5)
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"kept: {ratio:.2g}", (ratio, 1), (0, 3), **place, ha="center", color=FAINT, size=9)

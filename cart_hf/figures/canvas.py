"""An empty figure that is written to files: no display, no settings of the user's, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
_SETTINGS: dict[Any, Any] = {
    "font.size": 10.0,
    "text.color": "#222222",
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.fonttype": "none",
    "svg.hashsalt": "cart-hf",
}


@contextmanager
def new_figure(width: float, height: float, paths: Sequence[Path]) -> Iterator[Figure]:
    """Yield an empty figure, in inches, that is written to every path at the end; the user's settings do not matter.

    :raises UserError: when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise UserError("plots need matplotlib: pip install 'cart-hf[plot]'") from failure
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        yield figure
        for path in paths:
            undated = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, bbox_inches="tight", pad_inches=0.12, metadata=undated)

"""An analysis's figures, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.analysis.figures.parts import FIGURES
from cart_hf.errors import UserError, telling

__all__ = ["draw"]


def draw(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw every figure that the document has the numbers for, each as PNG and SVG.

    ``spectra``, ``reconstruction_interference``, ``interference``, ``similarity``, ``layers``; with scores ``radar``;
    with a search ``tuning`` and ``rank_curve``.

    :param document: what ``analysis.json`` holds.
    :param folder: where they are written.
    :return: what could not be drawn, and why.
    :raises UserError: when a file cannot be written.
    """
    notes: list[str] = []
    with telling(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in FIGURES.items():
            try:
                figure(document, [folder / f"{name}.{kind}" for kind in ("png", "svg")])
            except UserError as failure:  # such as no matplotlib: the numbers are what matters
                notes += failure.problems
    return list(dict.fromkeys(notes))

"""The folder of an analysis: JSON, CSV, figures and the page, written beside it and put in place at once."""

from __future__ import annotations

import json
from pathlib import Path

from cart_hf.analysis.document import as_document
from cart_hf.analysis.frames import FRAMES, frame
from cart_hf.analysis.model import Analysis
from cart_hf.errors import telling
from cart_hf.output import check_replaceable

ANALYSIS_FILE, PAGE_FILE, FIGURES_FOLDER = "analysis.json", "index.html", "figures"


def check_place(target: Path, *, overwrite: bool) -> None:
    """Refuse what exists, unless it is an empty folder, or ``overwrite`` and an earlier analysis.

    :raises UserError: with what to do.
    """
    check_replaceable(target, overwrite=overwrite, what="an analysis of cart-hf", marker=ANALYSIS_FILE)


def write_files(analysis: Analysis, folder: Path, target: Path) -> list[str]:
    """Write all files of an analysis.

    :param target: what the folder will be called, for messages.
    :return: what could not be drawn, and why.
    :raises UserError: when a file cannot be written.
    """
    from cart_hf.analysis.figures import draw
    from cart_hf.analysis.page import write_page

    document = as_document(analysis)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    with telling(f"cannot write {target}"):
        (folder / ANALYSIS_FILE).write_text(text + "\n", encoding="utf-8")
        for name in FRAMES:
            frame(analysis, name).to_csv(folder / f"{name}.csv", index=False, float_format="%.9g")
        figures = folder / FIGURES_FOLDER
        figures.mkdir()
        notes = draw(document, figures)
        write_page(document, folder / PAGE_FILE)
    return notes

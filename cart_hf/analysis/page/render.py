"""The page itself: one template, with the styles, the scripts and the numbers in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.analysis.page import words
from cart_hf.figures.style import CART, COLOURS

_SCRIPTS = (
    *("dom", "numbers", "tooltip", "controls", "lines", "heatmap", "bars", "radar"),
    *("shared", "sections", "explorer", "main"),
)
_UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
_DIGITS = 4


def write_page(document: Mapping[str, Any], path: Path) -> None:
    """Write an analysis as one HTML file, which needs no network and loads nothing. The same document makes the same
    bytes.

    :param document: what ``analysis.json`` holds.
    :param path: the file to write; it is replaced.
    :raises OSError: when it cannot be written.
    """
    path.write_bytes(rendered(document).encode("utf-8", "replace"))  # a file's name may hold what is no character


def rendered(document: Mapping[str, Any]) -> str:
    """Return the page.

    :param document: as for :func:`write_page`.
    """
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=words.percent, number=words.number, ratio=words.ratio, setting=words.setting)
    kept = words.kept_ratio(document)
    scripts = "\n".join((folder / "scripts" / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    return environment.get_template("page.html.jinja").render(
        document=document,
        about=document["about"],
        verdict=words.verdict(document, kept),
        kept=kept,
        trade_off=words.trade_off(document, kept),
        results=words.results_table(document["results"]),
        tuned=words.tuned(document["tuning"]),
        theorem=words.theorem(document["theorem"]),
        roles=words.roles(document["about"]["roles"]),
        colours=COLOURS,
        cart=CART,
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(scripts),
        data=Markup(embedded({**document, "rank_ratio": kept})),
    )


def embedded(document: Mapping[str, Any]) -> str:
    """Return a document as JSON that can stand inside ``<script>``, numbers to four digits: a plot shows no more.

    :param document: plain lists, dictionaries, texts and numbers, none of them NaN.
    :raises ValueError: when a number is not finite: JSON has no such numbers.
    """
    text = json.dumps(_shortened(document), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.translate(_UNSAFE)


def _shortened(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, Mapping):
        return {key: _shortened(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(entry) for entry in value]
    return value

"""What the cards tell of an analysis that lies in the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError
from cart_hf.evaluation.report import percent

ANALYSIS_FOLDER, SUMMARY_FILE = "analysis", "summary.json"
FORMAT = "cart-hf analysis summary 1"
FIGURES = {
    "reconstruction_interference.png": "reconstruction error and interference",
    "similarity.png": "how alike the task vectors are",
    "layers.png": "which layers carry which task",
    "rank_curve.png": "average score against the rank ratio",
    "radar.png": "normalised scores",
}
"""Of an analysis's figures those that a card shows, and what they are."""

PUBLISHED = {f"{ANALYSIS_FOLDER}/{name}" for name in (SUMMARY_FILE, *FIGURES)}
"""The files of an analysis that go to the Hub, by their paths."""

_NORMALIZED = {
    "all": "singular values over the norm of all of them",
    "top": "singular values over the norm of those that are kept",
    "none": "singular values as they are",
}


def is_private(path: str) -> bool:
    """Whether a file of a folder stays where it is: of an analysis all that the card does not show."""
    return path.startswith(f"{ANALYSIS_FOLDER}/") and path not in PUBLISHED


def described(folder: Path) -> dict[str, Any] | None:
    """Return what a card tells of an analysis, if the folder has one: ``text``, ``figures`` and ``warnings``.

    :raises UserError: when ``summary.json`` is damaged.
    """
    path = folder / ANALYSIS_FOLDER / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise UserError(f"{path} is not what this version of cart-hf writes; analyse again")
        captions = _captions(told)
        there = [name for name in FIGURES if path.with_name(name).is_file()]
        return {
            "text": _text(told),
            "figures": [
                {"path": f"{ANALYSIS_FOLDER}/{name}", "name": FIGURES[name], "caption": captions[name]}
                for name in there
            ],
            "warnings": [f"{warning}." for warning in told["warnings"]],
        }
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except (ValueError, KeyError, TypeError) as failure:
        raise UserError(f"{path} is damaged: analyse again, or remove {path.parent}") from failure


def _text(told: Mapping[str, Any]) -> str:
    """Say what was measured, what the rank keeps, and how much the row spaces interfere."""
    places = "their average" if told["interference"]["uncentred"] is None else "their average and around the base"
    lines = [f"`cart-hf analyze` measured the weights of the {len(told['models'])} models around {places}."]
    if told["lost"] is not None:
        keeps = "the merge keeps" if told["method"] == "cart" else "CART would keep"
        lines.append(
            f"At rank ratio {told['rank_ratio']:.3g}, {keeps} {percent(1 - told['lost'])} % of what sets the models "
            "apart (squared length of the centred task vectors, mean of the matrices)."
        )
    if told["interference"]["centred"] is not None:
        lines.append(f"There the row spaces of different models interfere by {_interference(told)}.")
    return "\n".join(lines)


def _interference(told: Mapping[str, Any]) -> str:
    centred, uncentred = (told["interference"][name] for name in ("centred", "uncentred"))
    normalized = _NORMALIZED[told["normalizer"]]
    if uncentred is None:
        return f"I = {centred:.3g} ({normalized})"
    return f"I = {centred:.3g} centred and {uncentred:.3g} uncentred ({normalized})"


def _captions(told: Mapping[str, Any]) -> dict[str, str]:
    """Return what each figure shows, with its most important number."""
    captions = {name: f"{text[:1].upper()}{text[1:]}" for name, text in FIGURES.items()}
    if told["lost"] is not None:
        captions["reconstruction_interference.png"] += (
            f" against the rank: at {told['rank_ratio']:.3g} of the full rank R(k) / R(0) = {told['lost']:.2f} and "
            f"{_interference(told)}"
        )
    for centre, words in (("base", "uncentred"), ("average", "centred")):
        alike = told["alike"].get(centre)
        if alike:
            one, other = alike["models"]
            captions["similarity.png"] += f"; most, {words}: `{one}` and `{other}` (cosine {alike['cosine']:.2f})"
    if told["block"]:
        captions["layers.png"] += (
            f": the largest part of the centred task vectors' squared length, {percent(told['block']['share'])} % in "
            f"the mean of the models, lies in `{told['block']['label']}`"
        )
    if told["tuned"]:
        score = "" if told["tuned"]["score"] is None else f" ({percent(told['tuned']['score'])} %)"
        captions["rank_curve.png"] += f" on {told['tuned']['where']}: best at {told['tuned']['best']}{score}"
    if told["scores"]:
        scores = ", ".join(f"{name} {percent(score)} %" for name, score in told["scores"].items())
        captions["radar.png"] += f", relative to each task's own model: {scores} on average"
    return {name: f"{text}." for name, text in captions.items()}

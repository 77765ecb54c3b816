"""What a model card tells of an analysis: few numbers, and no place of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cart_hf.analysis.document import FORMAT
from cart_hf.analysis.files import ANALYSIS_FILE
from cart_hf.analysis.page import words
from cart_hf.analysis.results import MERGED
from cart_hf.errors import UserError


def read_document(folder: Path) -> dict[str, Any]:
    """Read ``analysis.json``.

    :raises UserError: when the folder is no analysis of this version of cart-hf.
    """
    path = folder / ANALYSIS_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(
            f"{folder} is not an analysis ({ANALYSIS_FILE}: {failure.strerror}): expected a folder of cart-hf analyze"
        ) from failure
    except ValueError as failure:
        raise UserError(f"{path} is damaged: {' '.join(str(failure).split())}") from failure
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is not what this version of cart-hf writes (format {found!r}, expected {FORMAT!r})")
    return dict(document)


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the card tells: names of models and layers, and numbers.

    Warnings about files, which the record has too, are left out: they may name places.

    :param document: what ``analysis.json`` holds.
    """
    about = document["about"]
    kept = words.kept_ratio(document)
    trade_off = words.trade_off(document, kept)
    tuned = words.tuned(document["tuning"])
    names = [model["name"] for model in about["models"]]
    return {
        "version": about["version"],
        "method": about["method"],
        "models": names,
        "matrices": len(document["matrices"]),
        "normalizer": about["normalizer"],
        "rank_ratio": kept,
        "lost": trade_off.get("lost"),
        "interference": {name: trade_off.get(name) for name in ("centred", "uncentred")},
        "alike": {centre: _most_alike(mean["cosine"], names) for centre, mean in document["mean"].items()},
        "block": _largest_block(document),
        "scores": _scores(document["results"], about["method"]),
        "tuned": None if tuned is None else {key: tuned[key] for key in ("best", "score", "where", "on_edge")},
        "warnings": [warned["text"] for warned in document["warnings"] if warned["kind"] != "merge"],
    }


def _most_alike(cosine: Sequence[Sequence[float | None]], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the two models whose task vectors have the largest cosine, and it."""
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(cosine)
        for j, value in enumerate(row)
        if i < j and value is not None
    ]
    if not pairs:
        return None
    value, one, other = max(pairs)
    return {"models": [one, other], "cosine": value}


def _largest_block(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the block with the largest share of the centred task vectors, the mean of the models."""
    rows = [[share or 0.0 for share in row] for row in document["layers"]["share"]["average"]]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    if not means:
        return None
    largest = max(means)
    return {"label": document["blocks"][means.index(largest)]["label"], "share": largest}


def _scores(results: Mapping[str, Any] | None, method: str) -> dict[str, float]:
    """Return the merged model's scores, or its method's, relative to the individual models': the mean of the tasks."""
    rows = [row for row in (results["rows"] if results else []) if row["method"] == method or row["name"] == MERGED]
    return {row["name"]: row["normalized"] for row in rows if row["normalized"] is not None}

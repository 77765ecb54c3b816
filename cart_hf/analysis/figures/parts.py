"""Which figure is drawn from which part of the document; what is not there is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cart_hf.analysis.figures.curves import Curve, interference, reconstruction_interference
from cart_hf.analysis.figures.layers import Panel, layers
from cart_hf.analysis.figures.similarity import similarity
from cart_hf.analysis.figures.spectra import spectra
from cart_hf.analysis.page.words import kept_ratio
from cart_hf.benchmarking.figures import radar
from cart_hf.benchmarking.rows import COMPRESS, INDIVIDUAL, PRETRAINED
from cart_hf.figures.blocks import Block
from cart_hf.figures.style import number
from cart_hf.tuning.figures import RANK_RATIO, rank_curve, tuning_map, weight_average

Document = Mapping[str, Any]
Rows = list[list[float]]


def _spectra(document: Document, paths: Sequence[Path]) -> None:
    mean = _filled(document["mean"], "spectra")
    if mean:
        lines = {centre: (around["spectra_at"], _numbers(around["spectra"])) for centre, around in mean.items()}
        spectra(lines, _names(document), paths, recipe=kept_ratio(document))


def _reconstruction_interference(document: Document, paths: Sequence[Path]) -> None:
    curves = _curves(document)
    if curves:
        about = document["about"]
        reconstruction_interference(curves, about["ratios"], paths, about["normalizer"], kept_ratio(document))


def _interference(document: Document, paths: Sequence[Path]) -> None:
    curves = _curves(document)
    if curves:
        about = document["about"]
        interference(curves, about["ratios"], paths, about["normalizer"], kept_ratio(document))


def _similarity(document: Document, paths: Sequence[Path]) -> None:
    keys = ("cosine", "overlap", "pairs")
    mean = _filled(document["mean"], *keys)
    if mean:
        rows = {centre: {key: _numbers(around[key]) for key in keys} for centre, around in mean.items()}
        similarity(rows, _names(document), paths)


def _layers(document: Document, paths: Sequence[Path]) -> None:
    names, told = _names(document), document["layers"]
    columns = [Block(block["path"], block["block"], place, ("",)) for place, block in enumerate(document["blocks"])]
    panels = [
        Panel(
            f"share of the {word} task vector's squared length (%)",
            names,
            [[100 * x for x in row] for row in _numbers(rows)],
        )
        for centre, word in (("average", "centred"), ("base", "uncentred"))
        if (rows := told["share"].get(centre))
    ]
    if told["growth"]:
        merged = [told["merged_growth"]] if told["merged_growth"] else []
        rows = [[100 * x for x in row] for row in _numbers([*told["growth"], *merged])]
        panels.append(Panel("change relative to the base (%)", [*names, *(["merged"] if merged else [])], rows))
    if told["retention"]:
        panels.append(
            Panel("task vector found in the merge (1: all of it)", names, _numbers(told["retention"]), whole=1.0)
        )
    if columns and panels:
        layers(panels, columns, paths)


def _rank_curve(document: Document, paths: Sequence[Path]) -> None:
    tuning = document["tuning"]
    if tuning and tuning["points"] and RANK_RATIO in tuning["parameters"]:
        points = _points(tuning)
        rank_curve(points, tuning["best"], paths, weight_average(points))


def _tuning(document: Document, paths: Sequence[Path]) -> None:
    tuning = document["tuning"]
    if tuning and tuning["points"]:  # none where the settings were chosen without data
        tuning_map(_points(tuning), tuning["parameters"], tuning["best"], paths)


def _radar(document: Document, paths: Sequence[Path]) -> None:
    results = document["results"]
    if results:
        rows = {row["name"]: row["scores"] for row in results["rows"] if row["method"] != COMPRESS}
        alone = rows.pop(INDIVIDUAL, {})
        rows.pop(PRETRAINED, None)
        radar({name: _relative(scores, alone, results["tasks"]) for name, scores in rows.items()}, paths)


FIGURES: dict[str, Callable[[Document, Sequence[Path]], None]] = {
    "spectra": _spectra,
    "reconstruction_interference": _reconstruction_interference,
    "interference": _interference,
    "similarity": _similarity,
    "layers": _layers,
    "rank_curve": _rank_curve,
    "tuning": _tuning,
    "radar": _radar,
}


def _curves(document: Document) -> dict[str, Curve]:
    """Return each centre's means over all matrices, and its I(k) of each layer."""
    found = {}
    for centre, around in _filled(document["mean"], "reconstruction", "interference").items():
        layers: dict[tuple[str, int], Rows] = {}
        for matrix in document["matrices"]:
            whole = centre in matrix["around"] and len(matrix["models"]) == len(_names(document))
            if whole and matrix["block"] is not None:
                values = _numbers([matrix["around"][centre]["interference"]])
                layers.setdefault((matrix["path"], matrix["block"]), []).extend(values)
        reconstruction, mean = _numbers([around["reconstruction"], around["interference"]])
        found[centre] = Curve(reconstruction, mean, [_mean(rows) for rows in layers.values()])
    return found


def _filled(mean: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the centres that have some number under every key: none where no matrix is in all models."""
    return {
        centre: around
        for centre, around in mean.items()
        if around and all(_has_number(around.get(key)) for key in keys)
    }


def _has_number(values: Any) -> bool:
    return any(map(_has_number, values)) if isinstance(values, Sequence) else values is not None


def _names(document: Document) -> list[str]:
    return [model["name"] for model in document["about"]["models"]]


def _numbers(rows: Sequence[Sequence[float | None]]) -> Rows:
    return [[number(value) for value in row] for row in rows]


def _mean(rows: Rows) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _points(tuning: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    return [(point["parameters"], number(point["average"])) for point in tuning["points"]]


def _relative(
    scores: Mapping[str, float | None], alone: Mapping[str, float | None], tasks: Sequence[str]
) -> dict[str, float]:
    """Return scores relative to the individual models', NaN where one is not known."""
    return {task: number(scores.get(task)) / (number(alone.get(task)) or math.nan) for task in tasks}

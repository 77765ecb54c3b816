"""An analysis as plain JSON: what the figures, the page and other programs read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cart_hf import __version__
from cart_hf.analysis.model import Analysis, Around, Bound, Floats, Matrix
from cart_hf.analysis.places import Place, places_of
from cart_hf.analysis.tensors import Sums, cosine_of, ratio
from cart_hf.recipe.compression import Centre

FORMAT = "cart-hf analysis 1"
_POINTS = 64  # of a spectrum: a line of more looks the same
_DIGITS = 6


def as_document(analysis: Analysis) -> dict[str, Any]:
    """Return all of it as JSON holds it: NaN as None, numbers rounded to six digits."""
    found: dict[str, Any] = _plain(_document(analysis))
    return found


def _document(analysis: Analysis) -> dict[str, Any]:
    names = [model["name"] for model in analysis.about.models]
    places = places_of([*(t.name for t in analysis.tensors), *(matrix.name for matrix in analysis.matrices)])
    blocks = list(dict.fromkeys(places[tensor.name]._replace(part="") for tensor in analysis.tensors))
    centres = _centres(analysis)
    return {
        "format": FORMAT,
        "about": {**asdict(analysis.about), "version": __version__},
        "matrices": [_matrix(matrix, places[matrix.name]) for matrix in analysis.matrices],
        "mean": {centre: _mean(analysis, names, centre) for centre in centres},
        "blocks": [{"path": block.path, "block": block.block, "label": block.label} for block in blocks],
        "layers": _layers(analysis, names, places, blocks),
        "whole": _whole(analysis, names),
        "theorem": [_bound(bound, places[bound.name]) for bound in analysis.bounds],
        "warnings": [asdict(warned) for warned in analysis.warnings],
        "results": analysis.results,
        "tuning": analysis.tuning,
    }


def _centres(analysis: Analysis) -> list[Centre]:
    return ["average"] if analysis.about.base is None else ["average", "base"]


def _matrix(matrix: Matrix, place: Place) -> dict[str, Any]:
    return {
        "name": matrix.name,
        **place._asdict(),
        "shape": matrix.shape,
        "rank": matrix.rank,
        "models": matrix.models,
        "around": {centre: _around(around) for centre, around in matrix.around.items()},
    }


def _around(around: Around) -> dict[str, Any]:
    count = around.spectra.shape[1]
    at = np.unique(np.linspace(1, count, min(count, _POINTS)).round().astype(int))
    fields = {name: getattr(around, name) for name in Around.__dataclass_fields__}
    return {**fields, "spectra": around.spectra[:, at - 1], "spectra_at": at}


def _bound(bound: Bound, place: Place) -> dict[str, Any]:
    return {**place._asdict(), **asdict(bound)}


def _mean(analysis: Analysis, names: Sequence[str], centre: Centre) -> dict[str, Any]:
    """Average over the matrices that all models have."""
    whole = [matrix for matrix in analysis.matrices if len(matrix.models) == len(names) and centre in matrix.around]
    arounds = [matrix.around[centre] for matrix in whole]
    known = min((a.spectra.shape[1] / min(m.shape) for m, a in zip(whole, arounds, strict=True)), default=0.0)
    fractions = np.linspace(1 / _POINTS, 1, _POINTS) * known

    def spectra(matrix: Matrix, around: Around) -> Floats:
        at = np.maximum(np.ceil(fractions * min(matrix.shape) - 1e-9).astype(int), 1)
        return ratio(around.spectra[:, at - 1], np.sqrt(around.squares)[:, None])

    def mean(of: Callable[[Around], Floats]) -> Floats:
        return _nanmean([of(around) for around in arounds])

    return {
        "reconstruction": mean(lambda around: ratio(around.reconstruction, around.reconstruction[:1])),
        "interference": mean(lambda around: around.interference),
        "spectra": _nanmean([spectra(matrix, around) for matrix, around in zip(whole, arounds, strict=True)]),
        "spectra_at": fractions,
        "pairs": mean(lambda around: around.pairs),
        "cosine": mean(lambda around: around.cosine),
        "overlap": mean(lambda around: around.overlap),
    }


def _nanmean(arrays: Sequence[Floats]) -> Floats:
    """Average arrays of one shape, but for what is not a number; NaN where nothing is."""
    stack = np.stack(arrays) if arrays else np.zeros((0, 0))
    known = np.isfinite(stack)
    return ratio(np.where(known, stack, 0.0).sum(axis=0), known.sum(axis=0))


def _layers(
    analysis: Analysis, names: Sequence[str], places: Mapping[str, Place], blocks: Sequence[Place]
) -> dict[str, Any]:
    based = analysis.about.base is not None
    labels = [block.label for block in blocks]
    members = {label: [t for t in analysis.tensors if places[t.name].label == label] for label in labels}
    sums = [Sums.over(members[label], names) for label in labels]
    share = {"average": _shares([one.centred.diagonal() for one in sums])}
    if not based:
        return {"share": share, "growth": None, "merged_growth": None, "retention": None}
    share["base"] = _shares([one.products.diagonal() for one in sums])
    return {
        "share": share,
        "growth": np.stack([one.growth for one in sums], axis=1),
        "merged_growth": [one.merged_growth for one in sums],
        "retention": np.stack([one.retention for one in sums], axis=1),
    }


def _shares(squares: Sequence[Floats]) -> Floats:
    """Return how the blocks share each model's square, shape (T, B)."""
    table = np.stack(squares, axis=1)
    return ratio(table, table.sum(axis=1, keepdims=True))


def _whole(analysis: Analysis, names: Sequence[str]) -> dict[str, Any]:
    sums = Sums.over(analysis.tensors, names)
    around = {"average": cosine_of(sums.centred), "base": cosine_of(sums.products)}
    found = {
        "centred": np.sqrt(sums.centred.diagonal()),
        "cosine": {centre: around[centre] for centre in _centres(analysis)},
    }
    for name in ("update", "growth", "merged_growth", "merged_update", "retention", "merged_cosine"):
        found[name] = getattr(sums, name) if analysis.about.base is not None else None
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value

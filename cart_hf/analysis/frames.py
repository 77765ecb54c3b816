"""An analysis as pandas frames, for notebooks; the CSV files are written from the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cart_hf.analysis.curves import rank_at
from cart_hf.analysis.model import Analysis, Around, Matrix
from cart_hf.analysis.places import places_of
from cart_hf.analysis.tensors import Sums
from cart_hf.errors import UserError, did_you_mean
from cart_hf.recipe.compression import Centre

if TYPE_CHECKING:
    import pandas


def frame(analysis: Analysis, name: str) -> pandas.DataFrame:
    """Return one of the tables of an analysis.

    :param name: ``matrices`` (a row for each matrix, centre and model), ``curves`` (R and I over the rank),
        ``spectra`` (all singular values, each in a column), ``pairs`` (of models), ``tensors`` (norms of all tensors,
        by model) or ``theorem``.
    :raises UserError: when there is no such table.
    """
    if name not in FRAMES:
        raise UserError(f"an analysis has no table '{name}'{did_you_mean(name, FRAMES)}")
    return FRAMES[name](analysis)


def _table(columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(list(rows), columns=list(columns))


def _around(analysis: Analysis) -> Iterator[tuple[Matrix, Centre, Around]]:
    return ((matrix, centre, around) for matrix in analysis.matrices for centre, around in matrix.around.items())


def _matrices(analysis: Analysis) -> pandas.DataFrame:
    places = places_of([matrix.name for matrix in analysis.matrices])
    columns = ["matrix", "path", "block", "part", "rows", "columns", "rank", "centre", "model"]
    numbers = ["norm", "energy", "effective_rank", "stable_rank"]
    rows = (
        (matrix.name, *places[matrix.name], *matrix.shape, matrix.rank, centre, model, *values)
        for matrix, centre, around in _around(analysis)
        for model, *values in zip(
            matrix.models,
            np.sqrt(around.squares),
            around.energy,
            around.effective_rank,
            around.stable_rank,
            strict=True,
        )
    )
    return _table([*columns, *numbers], rows)


def _curves(analysis: Analysis) -> pandas.DataFrame:
    ratios = analysis.about.ratios
    rows = (
        (matrix.name, centre, ratio, rank_at(ratio, min(matrix.shape)), *values)
        for matrix, centre, around in _around(analysis)
        for ratio, *values in zip(ratios, around.reconstruction, around.interference, strict=True)
    )
    return _table(["matrix", "centre", "ratio", "k", "reconstruction", "interference"], rows)


def _spectra(analysis: Analysis) -> pandas.DataFrame:
    most = max((around.spectra.shape[1] for _, _, around in _around(analysis)), default=0)
    rows = (
        (matrix.name, centre, model, *values, *[np.nan] * (most - len(values)))
        for matrix, centre, around in _around(analysis)
        for model, values in zip(matrix.models, around.spectra, strict=True)
    )
    return _table(["matrix", "centre", "model", *(f"sigma_{place}" for place in range(1, most + 1))], rows)


def _pairs(analysis: Analysis) -> pandas.DataFrame:
    rows = (
        (matrix.name, centre, matrix.models[i], matrix.models[j], *(part[i, j] for part in parts))
        for matrix, centre, around in _around(analysis)
        for parts in [(around.cosine, around.overlap, around.pairs)]
        for i, j in zip(*np.triu_indices(len(matrix.models), 1), strict=True)
    )
    return _table(["matrix", "centre", "model", "other", "cosine", "overlap", "interference"], rows)


def _tensors(analysis: Analysis) -> pandas.DataFrame:
    columns = ["tensor", "role", "model", "norm", "centred_norm", "merged_norm"]
    based = ["base_norm", "update", "growth", "merged_update", "retention"]
    rows: list[tuple[Any, ...]] = []
    for tensor in analysis.tensors:
        sums = Sums.over([tensor], tensor.models)
        has_base = tensor.base_norm is not None
        for t, model in enumerate(tensor.models):
            plain = (tensor.norms[t], np.sqrt(tensor.centred[t, t]), tensor.merged_norm)
            about = (tensor.base_norm, sums.update[t], sums.growth[t], sums.merged_update, sums.retention[t])
            rows.append((tensor.name, tensor.role, model, *plain, *(about if has_base else [np.nan] * len(based))))
    return _table([*columns, *based], rows)


def _theorem(analysis: Analysis) -> pandas.DataFrame:
    rows = ((b.name, b.centre, b.rank, b.inputs, b.loss, b.bound, b.unprojected, b.inside) for b in analysis.bounds)
    return _table(["matrix", "centre", "rank", "inputs", "loss", "bound", "unprojected", "inside"], rows)


FRAMES: Mapping[str, Callable[[Analysis], pandas.DataFrame]] = {
    "matrices": _matrices,
    "curves": _curves,
    "spectra": _spectra,
    "pairs": _pairs,
    "tensors": _tensors,
    "theorem": _theorem,
}
"""The tables, by name."""

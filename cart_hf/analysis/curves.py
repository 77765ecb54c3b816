"""What the factors of one name's matrices say around one centre: errors and interference over the rank, overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cart_hf.analysis.model import Around, Floats, Normalizer
from cart_hf.analysis.tensors import ratio
from cart_hf.analysis.theorem import ROUNDING

if TYPE_CHECKING:
    from cart_hf.linalg.low_rank import Factors


def rank_at(rank_ratio: float, whole: int) -> int:
    """Return the rank k that a rank ratio means, as a recipe's does: rounded down, but at least one; 0 for 0."""
    return max(1, int(rank_ratio * whole)) if rank_ratio else 0


def around(
    factors: Factors,
    order: Sequence[int],
    *,
    ratios: Sequence[float],
    rank: int,
    normalizer: Normalizer,
    cosine: Floats,
    transposed: bool = False,
) -> Around:
    """Measure T matrices around their centre.

    ``I(k) = sum_{i != j} ||A_i A_j^T||_F`` with ``A_t = diag(sigma_t / s_t) V_t`` of the top k directions, V_t the
    right singular vectors as rows: the overlap of each two directions, weighted by both singular values. ``s_t`` is
    the norm of the whole matrix (``all``), so that I never falls with k, or of its top k directions (``top``), or 1.

    :param factors: of the T matrices, of at least ``rank`` directions and of all ranks that are sampled.
    :param order: their places in the order of the result.
    :param ratios: where the curves are sampled.
    :param rank: how many directions of each the recipe keeps.
    :param cosine: in the order of the result.
    :param transposed: whether the matrices are stored inputs first: their row spaces are then on the left.
    """
    whole = min(factors.left.shape[1], factors.right.shape[2])
    ranks = [rank_at(share, whole) for share in ratios]
    singular = factors.singular.cpu().double().numpy()[list(order)]
    squares = factors.squares.double().numpy()[list(order)]
    kept = np.concatenate([np.zeros((len(order), 1)), np.cumsum(singular**2, axis=1)], axis=1)
    complete = factors.rank == whole
    # where all singular values are known, their own sum: the error at full rank is exactly zero
    total = kept[:, -1] if complete else squares
    cuts = sorted({rank, *ranks} - {0})
    rows = [factors.left[place].mT if transposed else factors.right[place] for place in order]
    size = max(factors.left.shape[1], factors.right.shape[2])
    directions = [int((values > ROUNDING * size * values[0]).sum()) for values in singular[:, :rank]]
    blocks, overlap = _row_spaces(rows, ratio(singular**2, squares[:, None], 0.0), cuts, directions)
    if normalizer == "top":
        shares = ratio(kept[:, cuts], squares[:, None], 0.0)
        blocks = ratio(blocks, shares[:, None] * shares[None, :], 0.0)
    elif normalizer == "none":
        blocks = blocks * (squares[:, None] * squares[None, :])[:, :, None]
    pairs = np.sqrt(blocks)
    at = {cut: place for place, cut in enumerate(cuts)}
    return Around(
        spectra=singular,
        squares=squares,
        reconstruction=np.clip(total[:, None] - kept[:, ranks], 0.0, None).sum(axis=0),
        interference=np.array([pairs[:, :, at[k]].sum() if k else 0.0 for k in ranks]),
        pairs=pairs[:, :, at[rank]],
        cosine=cosine,
        overlap=overlap,
        effective_rank=_effective_rank(singular) if complete else np.full(len(order), np.nan),
        stable_rank=ratio(squares, singular[:, 0] ** 2),
        energy=np.minimum(ratio(kept[:, rank], squares), 1.0),
    )


def _row_spaces(
    rows: Sequence[torch.Tensor], shares: Floats, cuts: Sequence[int], directions: Sequence[int]
) -> tuple[Floats, Floats]:
    """Compare the row spaces of each two matrices.

    :param rows: T times the unit rows, shape (k, n).
    :param shares: of the squared norm that each row has, shape (T, k).
    :param cuts: ranks, ascending.
    :param directions: how many rows of each count for the overlap: those of the recipe's rank that are not rounding.
    :return: ``||A_i A_j^T||_F^2`` at each cut, normalised by the whole norms, shape (T, T, cuts), zero on the
        diagonal; and the overlap, shape (T, T).
    """
    count, most = len(rows), cuts[-1]
    blocks, overlap = np.zeros((count, count, len(cuts))), np.full((count, count), np.nan)
    spans = _spans(shares[:, :most], cuts)
    weights = [torch.from_numpy(span).to(row.dtype).to(row.device) for span, row in zip(spans, rows, strict=True)]
    for i in range(count):
        overlap[i, i] = 1.0 if directions[i] else np.nan
        for j in range(i):
            products = (rows[i][:most] @ rows[j][:most].mT).square_()
            # what each two stretches between cuts add; the corners' sums are those of the leading blocks
            sums = (weights[i] @ products @ weights[j].mT).cpu().double().numpy()
            blocks[i, j] = blocks[j, i] = sums.cumsum(axis=0).cumsum(axis=1).diagonal()
            if directions[i] and directions[j]:
                shared = float(products[: directions[i], : directions[j]].sum())
                overlap[i, j] = overlap[j, i] = min(shared / max(directions[i], directions[j]), 1.0)
    return blocks, overlap


def _spans(values: Floats, cuts: Sequence[int]) -> Floats:
    """Return values in a row for each stretch between cuts, zero elsewhere; shape (T, cuts, k)."""
    place = np.searchsorted(cuts, np.arange(values.shape[1]), side="right")
    spans: Floats = values[:, None, :] * (place == np.arange(len(cuts))[:, None])
    return spans


def _effective_rank(singular: Floats) -> Floats:
    parts = ratio(singular, singular.sum(axis=1, keepdims=True))  # NaN stays: of no length, of no rank
    logs = np.log(parts, where=parts > 0, out=np.zeros_like(parts))
    result: Floats = np.exp(-(parts * logs).sum(axis=1))
    return result

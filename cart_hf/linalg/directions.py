"""All singular directions of a matrix but those that are nothing but rounding, and matrices made orthonormal.

By the Gram matrix on the smaller side in float64 and divide and conquer, several times cheaper than a full SVD. A null
direction has no vectors of its own: what an SVD returns for it is arbitrary, and drowned in rounding. Methods that give
every direction the same length would make noise as long as what was learnt, so null directions are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cart_hf.linalg.gram import DecompositionError, widened
from cart_hf.linalg.low_rank import Factors

_ROUNDED = torch.finfo(torch.float32).eps  # in which models are stored, whatever the arithmetic's type
LEAST = 1e-6  # of a matrix: what arithmetic in float32 on it may add
_LARGEST = 4096  # rows of a Gram matrix for which the loss in its eigenvalues is sure to be allowed for


class Directions(NamedTuple):
    """The matrix ``left diag(singular) right``.

    :param left: shape (m, k), unit columns.
    :param singular: shape (k,), positive.
    :param right: shape (k, n), unit rows.
    """

    left: torch.Tensor
    singular: torch.Tensor
    right: torch.Tensor

    def cut(self, k: int) -> Directions:
        """Return the first ``k`` directions."""
        return Directions(self.left[:, :k], self.singular[:k], self.right[:k])


def directions(matrix: torch.Tensor, floor: float = 0.0) -> Directions:
    """Return the singular directions that are longer than ``floor``, the longest first; in float64 (MPS: float32).

    One of less than 1e-6 of the longest is lost in the rounding of the Gram matrix, and left out as well (MPS: 2e-2).
    Time is O(m n r + r^3), r = min(m, n).

    :param matrix: shape (m, n), float32 or float64, on any device; one of the two may be 0.
    :raises DecompositionError: when the eigenproblem fails or the matrix is not finite.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, singular, left = directions(matrix.mT, floor)
        return Directions(left.mT, singular, right.mT)
    wide = widened(matrix)
    vectors = eigenvectors(wide.mT @ wide, floor)
    left = wide @ vectors
    singular = torch.linalg.vector_norm(left, dim=0)  # what is left of an eigenvalue by rounding is less exact
    return Directions(left / singular, singular, vectors.mT)


def eigenvectors(gram: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Return the eigenvectors of a Gram matrix whose singular values, the roots of its eigenvalues, exceed ``floor``.

    :param gram: shape (n, n), as :func:`cart_hf.linalg.gram.widened` is; overwritten.
    :return: shape (n, k), the longest first, see :func:`directions`.
    """
    trace = float(gram.trace())
    if trace == 0.0:
        return gram[:, :0]
    if not trace < float("inf"):
        raise DecompositionError("the squared norm of the matrix is not finite")
    try:
        values, vectors = torch.linalg.eigh(gram.div_(trace))  # eigenvalues in [0, 1]: no scale can over- or underflow
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise DecompositionError(str(failure)) from failure
    least = max(floor * floor / trace, float(values[-1]) * _LARGEST * torch.finfo(gram.dtype).eps)
    kept: torch.Tensor = vectors[:, values > least].flip(1)
    return kept


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix whose columns (or rows, of a wide one) are orthonormal, in float64 (MPS: float32).

    It is the polar factor ``U V^T`` of the SVD, ``X (X^T X)^(-1/2)`` for the columns X: Procrustes' solution, also
    known as whitening. Of a rank-deficient matrix it is the same within the span: an isometry of its row space onto its
    column space that is zero across both, and the limit of whitening with a vanishing ridge.

    :param matrix: shape (m, n).
    """
    left, _, right = directions(matrix)
    return left @ right


def whitened_sum(parts: Directions, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``sum_i length_i u_i v_i^T``, the u and the v each made orthonormal among themselves, shape (m, n).

    :param parts: directions that need not be orthogonal, and may be more than m or n.
    :param lengths: shape (k,); default: their singular values.
    """
    singular = parts.singular if lengths is None else lengths
    left = orthonormal(parts.left)
    return (left * singular.to(left.dtype)) @ orthonormal(parts.right)


def side_by_side(factors: Factors, floor: float, ranks: Sequence[int] | None = None) -> Directions:
    """Return the directions of T matrices in one row, those longer than ``floor`` and 1e-6 of the matrix's longest.

    :param ranks: how many of each to look at; None: all there are.
    """
    heard = factors.singular > (LEAST * factors.singular[:, :1]).clamp(min=floor)
    if ranks is not None:
        places = torch.arange(factors.rank, device=heard.device)
        heard &= places < torch.tensor(ranks, device=heard.device)[:, None]
    return Directions(factors.left.mT[heard].mT, factors.singular[heard], factors.right[heard])


def rounding(base: torch.Tensor, models: int = 1) -> float:
    """Bound the largest singular value of what is nothing but rounding in the (summed) differences of models to a base.

    A model that is the base plus a low-rank update has no other directions; stored in float32 it has them all, each of
    a length that follows from the magnitudes of the entries. The norm of a random matrix is about the largest of its
    rows' plus the largest of its columns' norms; an entry's rounding error is at most half a spacing.

    :param base: shape (m, n).
    :param models: how many differences are summed, or stand side by side.
    """
    rows, columns = (torch.linalg.vector_norm(base, dim=dim).max() for dim in (1, 0))
    return 0.5 * _ROUNDED * float(rows + columns) * math.sqrt(models)

"""Best low-rank approximations of matrices of any shape, as factors that serve every smaller rank as well.

The best rank-k approximation of D (m x n, m >= n) is ``D V V^T`` with V the top k eigenvectors of ``D^T D``
(Eckart-Young), so only k eigenvectors of a small matrix are computed, several times cheaper than a full SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cart_hf.linalg.gram import LowRank, Solver, best_of_tall, rank_for_energy


@dataclass(frozen=True)
class Factors:
    """The top singular values and vectors of T matrices, largest first: ``left[t] diag(singular[t]) right[t]``.

    :param left: shape (T, m, k), unit columns.
    :param singular: shape (T, k). Zero, like its vectors, where a matrix has fewer than k directions.
    :param right: shape (T, k, n), unit rows.
    :param squares: ``||D_t||_F^2`` of the whole matrices, shape (T,).
    """

    left: torch.Tensor
    singular: torch.Tensor
    right: torch.Tensor
    squares: torch.Tensor

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.singular.shape[1]

    def cut(self, k: int) -> Factors:
        """Return the first ``k`` directions."""
        return Factors(self.left[:, :, :k], self.singular[:, :k], self.right[:, :k], self.squares)

    def masked(self, mask: torch.Tensor) -> Factors:
        """Return them with some directions set to zero.

        :param mask: what is kept, shape (T, k).
        """
        return replace(self, singular=self.singular * mask.to(self.singular))

    def ranks(self, *, rank: int | None = None, energy: float | None = None) -> list[int] | None:
        """Return how many directions of each matrix to keep, or None when more are asked for than there are.

        :param rank: k for all; or ``energy``, the share of each matrix's squared norm to keep.
        """
        whole = min(self.left.shape[1], self.right.shape[2])
        if rank is not None:
            k = min(rank, whole)
            return [k] * len(self.singular) if k <= self.rank else None
        found = [
            _directions(singular, square, energy or 1.0, all_known=self.rank == whole)
            for singular, square in zip(self.singular, self.squares.tolist(), strict=True)
        ]
        return [k for k in found if k is not None] if None not in found else None


def factorize(
    matrices: torch.Tensor, *, rank: int | None = None, energy: float | None = None, solver: Solver = "fast"
) -> Factors:
    """Return the factors of the best low-rank approximation of each matrix.

    :param matrices: shape (T, m, n), float32 or float64, on any device.
    :param rank: k for all matrices, 1 <= k <= min(m, n); give either this or ``energy``.
    :param energy: share of ``||D_t||_F^2`` to keep, in (0, 1]; k is then chosen for each matrix.
    :param solver: ``fast`` (checked: within 1e-3 of the best approximation) or ``exact`` (within 1e-6).
    :raises DecompositionError: when an eigenproblem fails, or its result is not finite or not orthonormal.
    """
    wide = matrices.shape[1] < matrices.shape[2]
    parts = best_of_tall(matrices.mT if wide else matrices, rank=rank, energy=energy, solver=solver)
    most = max(part.right.shape[0] for part in parts)
    left, singular, right = (torch.stack(same) for same in zip(*(_padded(part, most) for part in parts), strict=True))
    squares = torch.tensor([part.square for part in parts], dtype=torch.float64)
    return Factors(right.mT, singular, left.mT, squares) if wide else Factors(left, singular, right, squares)


def weighted_sum(factors: Factors, weight: Sequence[float], ranks: Sequence[int] | None = None) -> torch.Tensor:
    """Return ``sum_t w_t L_t``, ``L_t`` the best approximation of ``D_t`` of rank ``ranks[t]``, shape (m, n).

    The T products are formed as one: ``[w_1 left_1 ... w_T left_T] [right_1; ...; right_T]``.

    :param weight: T numbers.
    :param ranks: T ranks, none above the factors' own; None: all directions there are.
    """
    kept = list(enumerate(ranks if ranks is not None else [factors.rank] * len(weight)))
    left = [factors.left[t, :, :k] * (factors.singular[t, :k] * weight[t]) for t, k in kept]
    return torch.cat(left, dim=1) @ torch.cat([factors.right[t, :k] for t, k in kept])


def _padded(part: LowRank, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return left, singular values and right of one tall matrix, vectors of unit length, with zeros up to k."""
    missing = k - len(part.right)
    singular = _length(part.left)
    unit = part.left / torch.where(singular > 0, singular, 1.0)
    pad = torch.nn.functional.pad
    return pad(unit, (0, missing)), pad(singular, (0, missing)), pad(part.right, (0, 0, 0, missing))


def _length(columns: torch.Tensor) -> torch.Tensor:
    """Return the columns' Euclidean norms, of any scale: no square over- or underflows."""
    scale = columns.abs().amax(dim=0)
    length: torch.Tensor = scale * torch.linalg.vector_norm(columns / torch.where(scale > 0, scale, 1.0), dim=0)
    return length


def _directions(singular: torch.Tensor, square: float, energy: float, *, all_known: bool) -> int | None:
    """Return the least number of directions that hold the share ``energy`` of ``square``, or None if these do not."""
    kept = singular.cpu().double().square()
    rest = 0.0 if all_known else max(square - float(kept.sum()), 0.0)
    if rest > (1 - energy + 1e-6) * square:  # less is rounding
        return None
    return min(rank_for_energy(torch.cat([kept.new_tensor([rest]), kept.flip(0)]).numpy(), energy), len(singular))

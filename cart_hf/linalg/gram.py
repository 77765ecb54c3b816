"""The best low-rank approximation of tall matrices by their Gram matrices: an exact way and a fast one.

Exact: Gram matrix, tridiagonal form and eigenvectors in float64, which keeps the squared condition number harmless
(for float32 input the result is within 1e-6 of the truth). Fast: in float32, by block Lanczos where the rank is small
and by a full reduction elsewhere. What comes out is checked, and solved again the exact way where it may be further
than TOLERANCE from the truth: spikes over a flat bulk, ties, scales that float32 cannot square. Where more than half of
all eigenpairs are wanted, divide and conquer in float64 (torch) finds all of them sooner than either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cart_hf.linalg import lanczos
from cart_hf.linalg.eigenpairs import Eigenpairs
from cart_hf.linalg.symmetric import LapackError, Matrix, Tridiagonal, gram

Solver = Literal["fast", "exact"]
TOLERANCE = 1e-3  # of the fast way: relative error of a low-rank matrix, in the Frobenius norm
_ACCEPTED = TOLERANCE / 2  # of an estimated error
_MOST_PAIRS = 0.5  # of all: for more, all of them by divide and conquer in float64 take less time than these one by one
_ASKEW = 1e-2  # most that the product of two unit vectors may be before it is mended, to its square
_LEAST, _MOST = 1e-20, 1e30  # squared norms between which float32 neither loses nor overflows a sum of squares


class DecompositionError(ArithmeticError):
    """A decomposition did not converge, or its result fails the check."""


class LowRank(NamedTuple):
    """A low-rank matrix as the product ``left @ right``; left's columns and right's rows are orthogonal.

    :param left: shape (m, k).
    :param right: shape (k, n).
    :param square: squared Frobenius norm of the matrix that this is the best approximation of.
    """

    left: torch.Tensor
    right: torch.Tensor
    square: float


def best_of_tall(
    matrices: torch.Tensor, *, rank: int | None = None, energy: float | None = None, solver: Solver = "fast"
) -> list[LowRank]:
    """Return ``D V`` and ``V^T`` for each matrix D, V its top right singular vectors, the largest first.

    :param matrices: shape (T, m, n), m >= n, float32 or float64, on any device.
    :param rank: number k of vectors; or ``energy``, the share of ``||D||_F^2`` that each matrix's k vectors keep.
        A zero matrix has none.
    :param solver: ``fast`` or ``exact``; float64 is always solved exactly.
    :raises DecompositionError: when the exact way fails, or its result is not finite or not orthonormal.
    """
    found: Sequence[LowRank | None] = [None] * len(matrices)
    if solver == "fast" and matrices.dtype == torch.float32 and not _are_many(matrices.shape[2], rank):
        if matrices.device.type == "cpu":
            found = [_fast(matrix, rank, energy) for matrix in matrices]
        elif rank is not None and lanczos.suits(matrices.shape[2], rank):
            found = _fast_on_device(matrices, rank)
    return [
        _exact(matrix, rank, energy) if part is None else part for matrix, part in zip(matrices, found, strict=True)
    ]


def rank_for_energy(eigenvalues: npt.NDArray[np.floating], energy: float) -> int:
    """Return the least k whose top k eigenvalues hold ``energy`` of their sum.

    :param eigenvalues: squared singular values, ascending.
    """
    descending = np.clip(eigenvalues[::-1].astype(np.float64), 0.0, None)
    cumulative = np.cumsum(descending)
    # Rounding may leave the last cumulated share under 1.0: never ask for more than there are.
    return min(int(np.searchsorted(cumulative, energy * cumulative[-1] * (1 - 1e-12))) + 1, len(eigenvalues))


def _fast(matrix: torch.Tensor, rank: int | None, energy: float | None) -> LowRank | None:
    """Solve one matrix on the CPU in float32; None when that may not be good enough."""
    product = gram(_dense(matrix).numpy())
    trace = float(product.trace(dtype=np.float64))
    if not _LEAST < trace < _MOST:
        return None
    product /= trace
    lower = torch.from_numpy(product)
    whole = (lower + lower.tril(-1).mT).mT  # symmetric, and now in rows: products with it are faster
    if rank is not None and lanczos.suits(len(whole), rank):
        (pairs,) = lanczos.top_eigenpairs(whole[None], rank, _ACCEPTED)
        if pairs is not None:
            return _confirmed(matrix, trace, pairs)
    try:
        pairs = _reduced(product, whole, rank, energy)
    except LapackError:
        return None
    return _confirmed(matrix, trace, pairs) if pairs.error() <= _ACCEPTED else None


def _reduced(product: Matrix, whole: torch.Tensor, rank: int | None, energy: float | None) -> Eigenpairs:
    """Return the top eigenpairs by a full reduction in float32, which overwrites ``product``."""
    n = len(product)
    tridiagonal = Tridiagonal(product)
    k = rank if rank is not None else rank_for_energy(tridiagonal.eigenvalues(), energy or 1.0)
    found, rows = (torch.from_numpy(part).flip(0) for part in tridiagonal.top_eigenpairs(min(k + 1, n)))
    rounding = torch.linalg.vector_norm(rows @ whole - found[:, None] * rows, dim=1)[:k].double()
    values = torch.cat([found, found.new_zeros(k + 1 - len(found))]).double()  # k = n: nothing is discarded
    return Eigenpairs(rows[:k], values, torch.zeros_like(values), rounding)


def _fast_on_device(matrices: torch.Tensor, rank: int) -> list[LowRank | None]:
    """Solve all matrices at once on their device in float32; None where that may not be good enough."""
    grams = matrices.mT @ matrices
    traces = grams.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(_LEAST, _MOST)
    solved = lanczos.top_eigenpairs(grams.div_(traces[:, None, None]), rank, _ACCEPTED)
    return [
        _confirmed(matrix, trace, pairs) if pairs is not None and _LEAST < trace < _MOST else None
        for matrix, trace, pairs in zip(matrices, traces.tolist(), solved, strict=True)
    ]


def _confirmed(matrix: torch.Tensor, trace: float, pairs: Eigenpairs) -> LowRank | None:
    """Return the low-rank matrix if the vectors are orthonormal and as long in ``matrix`` as their values say."""
    values, overlap = pairs.values[: len(pairs.rows)], pairs.rows @ pairs.rows.mT
    # a step of Newton and Schulz: float32 leaves the vectors of close eigenvalues a little askew
    rows = 1.5 * pairs.rows - 0.5 * overlap @ pairs.rows
    left = matrix @ rows.mT
    lengths = (left * left).sum(dim=0).cpu().double() / trace
    askew = float((overlap - torch.eye(len(rows), device=rows.device)).abs().max())
    close = ((lengths - values).abs() <= TOLERANCE * values + 1e-6 * values[0]).all()
    return LowRank(left, rows, trace) if bool(close) and askew < _ASKEW else None


def _are_many(n: int, rank: int | None) -> bool:
    return rank is not None and rank > _MOST_PAIRS * n


def _exact(matrix: torch.Tensor, rank: int | None, energy: float | None) -> LowRank:
    by_parts = matrix.device.type == "cpu" and not _are_many(matrix.shape[1], rank)
    solve = _solve_lapack if by_parts else _solve_torch
    solution = solve(matrix, rank, energy)
    if solution is None:
        return LowRank(matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, matrix.shape[1]), 0.0)
    values, rows, trace = solution
    _check(values, rows)
    rows = rows.to(matrix.dtype).flip(0)
    return LowRank(matrix @ rows.mT, rows, trace)


Solution = tuple[torch.Tensor, torch.Tensor, float]
"""The top k eigenvalues of the Gram matrix over its trace, ascending, their eigenvectors as rows, and the trace."""


def _solve_lapack(matrix: torch.Tensor, rank: int | None, energy: float | None) -> Solution | None:
    product = gram(_dense(matrix.to(torch.float64)).numpy())
    trace = _finite(float(product.trace()))
    if trace == 0.0:
        return None
    product /= trace  # eigenvalues in [0, 1]: no scale can over- or underflow
    try:
        tridiagonal = Tridiagonal(product)
        k = rank if rank is not None else rank_for_energy(tridiagonal.eigenvalues(), energy or 1.0)
        values, rows = tridiagonal.top_eigenpairs(k)
    except LapackError as failure:
        raise DecompositionError(str(failure)) from failure
    return torch.from_numpy(values), torch.from_numpy(rows), trace


def _solve_torch(matrix: torch.Tensor, rank: int | None, energy: float | None) -> Solution | None:
    wide = widened(matrix)  # on MPS the result is less exact, and checked against a wider tolerance
    product = wide.T @ wide
    trace = _finite(float(product.trace()))
    if trace == 0.0:
        return None
    try:
        values, vectors = torch.linalg.eigh(product.div_(trace))
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise DecompositionError(str(failure)) from failure
    k = rank if rank is not None else rank_for_energy(values.double().cpu().numpy(), energy or 1.0)
    return values[-k:], vectors[:, -k:].T.contiguous(), trace


def widened(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix in float64, or in float32 on Apple's MPS, which has no float64."""
    return matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix contiguous by rows or by columns: copied only if it is neither."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def _finite(trace: float) -> float:
    if not np.isfinite(trace):
        raise DecompositionError("the squared norm of the centred matrix is not finite")
    return trace


def _check(values: torch.Tensor, rows: torch.Tensor) -> None:
    """Refuse eigenvectors that are not finite or not of unit length, or eigenvalues outside [0, 1]."""
    tolerance = 1e-8 if rows.dtype == torch.float64 else 1e-3
    if not (torch.isfinite(rows).all() and torch.isfinite(values).all()):
        raise DecompositionError("the eigenvectors are not finite")
    if float(((rows * rows).sum(dim=1) - 1).abs().max()) > tolerance:
        raise DecompositionError("the eigenvectors are not of unit length")
    if float(values.max()) > 1 + tolerance or float(values.min()) < -tolerance:
        raise DecompositionError("the eigenvalues of a Gram matrix lie between 0 and its trace")

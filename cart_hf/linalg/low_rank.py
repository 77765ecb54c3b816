"""The weighted sum of best rank-k approximations, by the Gram matrix of the smaller side in float64.

The best rank-k approximation of D (m x n, m >= n) is ``D V V^T`` with V the top k eigenvectors of ``D^T D``
(Eckart-Young). Only k eigenvectors are computed, which is several times cheaper than a full SVD; float64 keeps the
squared condition number harmless (relative error of the result about 1e-7 for float32 input).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from cart_hf.linalg.symmetric import LapackError, Tridiagonal, gram


class DecompositionError(ArithmeticError):
    """A decomposition did not converge, or its result fails the check."""


def sum_of_low_rank(
    matrices: torch.Tensor, weight: Sequence[float], *, rank: int | None = None, energy: float | None = None
) -> torch.Tensor:
    """Return ``sum_t w_t L_t``, ``L_t`` the best rank-k approximation of ``matrices[t]``.

    The T products are formed as one: with ``V = [V_1 ... V_T]`` and ``B = [w_1 D_1 V_1 ... w_T D_T V_T]`` the sum is
    ``B V^T``.

    :param matrices: shape (T, m, n), float32 or float64, on any device.
    :param weight: T factors.
    :param rank: k for all matrices, 1 <= k <= min(m, n); give either this or ``energy``.
    :param energy: share of ``||D_t||_F^2`` to keep, in (0, 1]; k is then chosen for each matrix.
    :raises DecompositionError: when an eigenproblem fails, or its result is not finite or not orthonormal.
    """
    wide = matrices.shape[1] < matrices.shape[2]
    tall = matrices.transpose(1, 2) if wide else matrices
    bases, coordinates = [], []
    for matrix, w in zip(tall, weight, strict=True):
        right = top_right_singular_vectors(matrix, rank=rank, energy=energy)
        if right is not None:
            bases.append(right)
            coordinates.append((matrix @ right.T).mul_(w))
    if not bases:
        return torch.zeros_like(matrices[0])
    total = torch.cat(coordinates, dim=1) @ torch.cat(bases)
    return total.T if wide else total


def top_right_singular_vectors(
    matrix: torch.Tensor, *, rank: int | None = None, energy: float | None = None
) -> torch.Tensor | None:
    """Return the top k right singular vectors as rows, shape (k, n) and ``matrix``'s dtype and device.

    :param matrix: shape (m, n), m >= n.
    :return: None when the matrix is zero: it has no direction to keep.
    :raises DecompositionError: see :func:`sum_of_low_rank`.
    """
    solve = _solve_lapack if matrix.device.type == "cpu" else _solve_torch
    solution = solve(matrix, rank, energy)
    if solution is None:
        return None
    values, rows = solution
    _check(values, rows)
    return rows.to(matrix.dtype)


def rank_for_energy(eigenvalues: npt.NDArray[np.float64], energy: float) -> int:
    """Return the least k whose top k eigenvalues hold ``energy`` of their sum.

    :param eigenvalues: squared singular values, ascending.
    """
    descending = np.clip(eigenvalues[::-1], 0.0, None)
    cumulative = np.cumsum(descending)
    # Rounding may leave the last cumulated share under 1.0: never ask for more than there are.
    return min(int(np.searchsorted(cumulative, energy * cumulative[-1] * (1 - 1e-12))) + 1, len(eigenvalues))


Solution = tuple[torch.Tensor, torch.Tensor]
"""The top k eigenvalues of the Gram matrix over its trace, ascending, and their eigenvectors as rows."""


def _solve_lapack(matrix: torch.Tensor, rank: int | None, energy: float | None) -> Solution | None:
    product = gram(matrix.to(torch.float64).contiguous().numpy())
    trace = _trace(float(product.trace()))
    if trace == 0.0:
        return None
    product /= trace  # eigenvalues in [0, 1]: no scale can over- or underflow
    try:
        tridiagonal = Tridiagonal(product)
        k = rank if rank is not None else rank_for_energy(tridiagonal.eigenvalues(), energy or 1.0)
        values, rows = tridiagonal.top_eigenpairs(k)
    except LapackError as failure:
        raise DecompositionError(str(failure)) from failure
    return torch.from_numpy(values), torch.from_numpy(rows)


def _solve_torch(matrix: torch.Tensor, rank: int | None, energy: float | None) -> Solution | None:
    # Apple's MPS has no float64: its result is less exact, and checked against a wider tolerance
    wide = matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)
    product = wide.T @ wide
    trace = _trace(float(product.trace()))
    if trace == 0.0:
        return None
    try:
        values, vectors = torch.linalg.eigh(product.div_(trace))
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise DecompositionError(str(failure)) from failure
    k = rank if rank is not None else rank_for_energy(values.double().cpu().numpy(), energy or 1.0)
    return values[-k:], vectors[:, -k:].T.contiguous()


def _trace(value: float) -> float:
    if not np.isfinite(value):
        raise DecompositionError("the squared norm of the centred matrix is not finite")
    return value


def _check(values: torch.Tensor, rows: torch.Tensor) -> None:
    """Refuse eigenvectors that are not finite or not of unit length, or eigenvalues outside [0, 1]."""
    tolerance = 1e-8 if rows.dtype == torch.float64 else 1e-3
    if not (torch.isfinite(rows).all() and torch.isfinite(values).all()):
        raise DecompositionError("the eigenvectors are not finite")
    if float(((rows * rows).sum(dim=1) - 1).abs().max()) > tolerance:
        raise DecompositionError("the eigenvectors are not of unit length")
    if float(values.max()) > 1 + tolerance or float(values.min()) < -tolerance:
        raise DecompositionError("the eigenvalues of a Gram matrix lie between 0 and its trace")

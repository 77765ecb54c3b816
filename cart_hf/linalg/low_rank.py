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

from cart_hf.linalg.lapack import LapackError, Tridiagonal

ORTHONORMAL_TOLERANCE = 1e-8
ENERGY_TOLERANCE = 1e-7


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
    gram = _gram(matrix)
    trace = float(gram.diagonal().sum())
    if trace == 0.0:
        return None
    if not np.isfinite(trace):
        raise DecompositionError("the squared norm of the centred matrix is not finite")
    on_cpu = matrix.device.type == "cpu"
    rows, values = (_solve_lapack if on_cpu else _solve_torch)(gram, trace, rank, energy)
    _check(rows, values, trace)
    return rows.to(matrix.dtype)


def rank_for_energy(eigenvalues: npt.NDArray[np.float64], energy: float) -> int:
    """Return the least k whose top k eigenvalues hold ``energy`` of their sum.

    :param eigenvalues: squared singular values, ascending.
    """
    descending = np.clip(eigenvalues[::-1], 0.0, None)
    cumulative = np.cumsum(descending)
    # Rounding may leave the last cumulated share under 1.0: never ask for more than there are.
    return min(int(np.searchsorted(cumulative, energy * cumulative[-1] * (1 - 1e-12))) + 1, len(eigenvalues))


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix^T matrix`` in float64 (float32 where the device, such as Apple's MPS, has no float64)."""
    wide = matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)
    return wide.T @ wide


def _solve_lapack(
    gram: torch.Tensor, trace: float, rank: int | None, energy: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = gram.mul_(1.0 / trace).numpy()  # eigenvalues in [0, 1]: no scale can over- or underflow
    try:
        tridiagonal = Tridiagonal(scaled)
        values = tridiagonal.eigenvalues()
        k = rank if rank is not None else rank_for_energy(values, energy or 1.0)
        rows = tridiagonal.top_eigenvectors(k)
    except LapackError as failure:
        raise DecompositionError(str(failure)) from failure
    return torch.from_numpy(rows), torch.from_numpy(values[-k:])


def _solve_torch(
    gram: torch.Tensor, trace: float, rank: int | None, energy: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        values, vectors = torch.linalg.eigh(gram.div_(trace))
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise DecompositionError(str(failure)) from failure
    k = rank if rank is not None else rank_for_energy(values.double().cpu().numpy(), energy or 1.0)
    return vectors[:, -k:].T.contiguous(), values[-k:]


def _check(rows: torch.Tensor, values: torch.Tensor, trace: float) -> None:
    """Refuse eigenvectors that are not finite or not orthonormal, or eigenvalues outside [0, trace]."""
    tolerance = ORTHONORMAL_TOLERANCE if rows.dtype == torch.float64 else 1e-3
    if not (torch.isfinite(rows).all() and torch.isfinite(values).all()):
        raise DecompositionError("the eigenvectors are not finite")
    lengths = (rows * rows).sum(dim=1)
    if float((lengths - 1).abs().max()) > tolerance:
        raise DecompositionError("the eigenvectors are not of unit length")
    if float(values.max()) > 1 + ENERGY_TOLERANCE + tolerance or float(values.min()) < -tolerance:
        raise DecompositionError(f"eigenvalues outside [0, {trace:g}]")

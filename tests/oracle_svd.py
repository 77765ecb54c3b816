"""An independent reference for the methods that decompose task vectors: float64 NumPy SVDs, one matrix at a time.

Nothing here imports cart_hf. Singular values below 1e-9 of a matrix's norm count as zero.
"""

from __future__ import annotations

import numpy as np


def svd(matrix: np.ndarray, whole: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD without null directions; `whole` is what the matrix is a part of."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    k = int((s > 1e-9 * np.linalg.norm(matrix if whole is None else whole)).sum())
    return u[:, :k], s[:k], vt[:k]


def polar(matrix: np.ndarray) -> np.ndarray:
    u, _, vt = svd(matrix)
    return u @ vt


def task_vectors(base: np.ndarray, models: np.ndarray) -> np.ndarray:
    return models.astype(np.float64) - base.astype(np.float64)


def tsv_m(base: np.ndarray, models: np.ndarray, scale: float, k: int) -> np.ndarray:
    parts = [svd(tau) for tau in task_vectors(base, models)]
    u = np.concatenate([u[:, :k] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:k] for _, s, _ in parts])
    vt = np.concatenate([vt[:k] for _, _, vt in parts])
    return base + scale * polar(u) @ np.diag(s) @ polar(vt)


def iso_c(base: np.ndarray, models: np.ndarray, scale: float) -> np.ndarray:
    u, s, vt = svd(task_vectors(base, models).sum(axis=0))
    return base + scale * s.mean() * u @ vt


def iso_cts(base: np.ndarray, models: np.ndarray, scale: float, fraction: float) -> np.ndarray:
    tasks, r = len(models), min(base.shape)
    together = round((r - int(r * fraction)) / tasks) * tasks
    together = together if together <= r else together - tasks
    k, s = r - together, together // tasks
    taus = task_vectors(base, models)
    common = [part[..., :k] if i < 2 else part[:k] for i, part in enumerate(svd(taus.sum(axis=0)))]
    parts = [common]
    for tau in taus:
        u, sigma, vt = svd(tau - common[0] @ common[0].T @ tau, tau)
        parts.append([u[:, :s], sigma[:s], vt[:s]])
    u = np.concatenate([part[0] for part in parts], axis=1)
    sigma = np.concatenate([part[1] for part in parts])
    vt = np.concatenate([part[2] for part in parts])
    return base + scale * sigma.mean() * polar(u) @ polar(vt)


def knots(
    base: np.ndarray, models: np.ndarray, scale: float, density: list[float], weights: list[float], mean: bool = True
) -> np.ndarray:
    taus = task_vectors(base, models)
    u, s, vt = svd(np.concatenate(list(taus), axis=1))
    blocks = np.split(s[:, None] * vt, len(taus), axis=1)
    trimmed = []
    for block, share in zip(blocks, density, strict=True):
        ordered = np.sort(np.abs(block).ravel())
        trimmed.append(
            np.where(np.abs(block) >= ordered[max(len(ordered) - int(share * len(ordered)), 1) - 1], block, 0)
        )
    w = np.reshape(weights, (-1, 1, 1))
    stack = np.stack(trimmed)
    sign = np.where((w * stack).sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(stack) == sign
    mass = (w * agrees).sum(axis=0) if mean else 1.0
    return base + scale * u @ ((w * stack * agrees).sum(axis=0) / np.where(mass == 0, 1, mass))

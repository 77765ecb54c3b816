"""Breadcrumbs, DELLA, Model Stock and SLERP in plain float64 NumPy, from the papers. Nothing here imports cart_hf."""

from __future__ import annotations

import itertools

import numpy as np

Array = np.ndarray


def summed(terms: Array, weight, normalize: bool, elect: bool) -> Array:
    """The (weighted) sum or mean of what is left of the task vectors; after TIES' election of signs, if asked."""
    w = np.reshape(np.asarray(weight, dtype=np.float64), (-1, *[1] * (terms.ndim - 1)))
    if not elect:
        total = (w * terms).sum(0)
        return total / w.sum() if normalize else total
    positive = (w * terms).sum(0) >= 0
    agrees = np.where(positive, terms > 0, terms < 0)
    mass = (w * agrees).sum(0)
    total = (w * terms * agrees).sum(0)
    return total / np.where(mass == 0, 1, mass) if normalize else total


def crumbs(task_vector: Array, density: float, gamma: float) -> Array:
    """Sort the magnitudes, drop the largest, keep so many of the next, drop the rest."""
    order = np.argsort(-np.abs(task_vector), axis=None, kind="stable")
    n = order.size
    keep = min(n, max(1, int(density * n)))
    top = min(int(gamma * n), n - keep)
    result = np.zeros(n)
    chosen = order[top : top + keep]
    result[chosen] = task_vector.reshape(-1)[chosen]
    return result.reshape(task_vector.shape)


def breadcrumbs(base, models, scale, density, gamma, weight, normalize=False, elect=False) -> Array:
    taus = models - base  # in the type of the models: the order of magnitudes is that of stored differences
    left = np.stack([crumbs(t, d, g).astype(np.float64) for t, d, g in zip(taus, density, gamma, strict=True)])
    return base + scale * summed(left, weight, normalize, elect)


def keep_probability(row: Array, density: float, epsilon: float) -> Array:
    """MAGPRUNE: by rank in the row, from density - epsilon to density + epsilon."""
    half = min(epsilon, density, 1 - density)
    ranks = [sum(abs(y) < abs(x) for y in row) + sum(abs(y) == abs(x) for y in row[:i]) for i, x in enumerate(row)]
    if len(row) == 1:
        return np.array([density])
    return np.array([density + half * (2 * rank / (len(row) - 1) - 1) for rank in ranks])


def della(base, models, drawn, scale, density, epsilon, weight, normalize=True, rescale=True, elect=True) -> Array:
    """With the uniform numbers that decide what is dropped, shape (T, rows, columns)."""
    left = np.zeros(models.shape)
    for t, i in itertools.product(range(len(models)), range(models.shape[1])):
        tau = models[t, i].astype(np.float64) - base[i]
        p = keep_probability(tau, density[t], epsilon[t])
        kept = drawn[t, i] < p
        left[t, i, kept] = tau[kept] / p[kept] if rescale else tau[kept]
    return base + scale * summed(left, weight, normalize, elect)


def stock_ratio(offsets: Array) -> float:
    count = len(offsets)
    flat = offsets.reshape(count, -1)
    cosines = []
    for a, b in itertools.combinations(flat, 2):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(a @ b / norms if norms > 0 else 0.0)
    if not cosines:
        return 1.0
    cosine = max(0.0, float(np.mean(cosines)))
    return count * cosine / (1 + (count - 1) * cosine)


def model_stock(base, models, filter_wise=False) -> Array:
    models, base = models.astype(np.float64), base.astype(np.float64)
    if filter_wise:
        return np.stack([model_stock(base[i], models[:, i]) for i in range(len(base))])
    t = stock_ratio(models - base)
    return t * models.mean(0) + (1 - t) * base


def slerp(first, second, t) -> Array:
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = (a * b).sum() / norms if norms > 0 else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)

"""WUDI, ACE, SVC, LiNeS and LARV in plain float64 NumPy, written from the papers' equations. Nothing imports cart_hf."""

from __future__ import annotations

import numpy as np


def wudi_objective(x, taus):
    return sum(np.linalg.norm((x - tau) @ tau.T) ** 2 / np.linalg.norm(tau) ** 2 for tau in taus if tau.any())


def wudi_closed(models, base, scale, ridge):
    """The minimum as one least-squares problem, its prior included: no normal equation."""
    taus = [tau for tau in models - base if tau.any()]
    if not taus:
        return base.copy()
    start = sum(taus)
    n = base.shape[1]
    mu = ridge * len(taus) / n  # the mean eigenvalue: each task adds a trace of 1
    rows = [tau / np.linalg.norm(tau) for tau in taus] + [np.sqrt(mu) * np.eye(n)]
    wanted = [tau / np.linalg.norm(tau) @ tau.T for tau in taus] + [np.sqrt(mu) * start.T]
    # (X - τ) τ^T = 0, transposed: τ X^T = τ τ^T
    return base + scale * np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0].T


def wudi_adam(models, base, scale, learning_rate, iterations):
    """The authors' steps: the gradient of each task's term, added up."""
    taus = [tau for tau in models - base if tau.any()]
    x = np.sum(models - base, axis=0)
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, iterations + 1):
        gradient = sum(2 * ((x - tau) @ tau.T) @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        x = x - learning_rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return base + scale * x


def ace(models, base, scale=1.0, epsilon=1e-5, threshold=0.3, top_fraction=0.3):
    taus = models - base
    centred = taus - taus.mean(axis=1, keepdims=True)
    kept = [t for t in range(len(taus)) if np.linalg.norm(centred[t]) > 1e-6 * np.linalg.norm(taus[t])]
    if not kept:
        return base.copy()
    taus, centred = taus[kept], centred[kept]
    n = base.shape[1]
    energy = np.array([np.linalg.norm(tau) ** 2 for tau in taus])
    logs = np.log(energy)
    uneven = len(taus) > 1 and np.var(logs, ddof=1) / np.mean(logs) ** 2 > threshold
    covariances = [w.T @ w for w in centred]
    traces = [np.trace(c) if uneven else 1.0 for c in covariances]
    scaled = [c / trace for c, trace in zip(covariances, traces, strict=True)]
    regular = [c + epsilon / trace * np.eye(n) for c, trace in zip(scaled, traces, strict=True)]
    prior = np.ones((n, 1)) @ (np.ones((1, n)) @ sum(scaled) / n)
    if uneven:
        prior = prior / energy.mean()
    update = sum(w @ s for w, s in zip(centred, regular, strict=True)) @ np.linalg.inv(sum(regular) + prior)
    if uneven:
        mean = sum(regular) / len(regular)
        fused = update + sum(tau @ (s - mean) for tau, s in zip(taus, scaled, strict=True))
        u, sigma, vt = np.linalg.svd(fused, full_matrices=False)
        k = max(1, int(top_fraction * len(sigma)))
        update = update + sigma[:k].mean() * u[:, :k] @ vt[:k]
    return base + scale * update


def svc(merged, base, models, alpha):
    u, sigma, vt = np.linalg.svd(merged - base, full_matrices=False)
    for r in range(len(sigma)):
        total = 0.0
        for model in models:
            own = u[:, r] @ (model - base)
            share = (u[:, r] @ (merged - base)) @ own / (own @ own) if own.any() else 0.0
            total += max(alpha, share)
        sigma[r] *= len(models) / total
    return base + (u * sigma) @ vt


def larv_numbers(base, models):
    """The effective-rank contrast and the conflict with the base of one matrix."""
    update = (models - base).sum(axis=0)

    def effective_rank(matrix):
        share = np.linalg.svd(matrix, compute_uv=False) ** 2
        share = share[share > 0] / share.sum()
        return np.exp(-(share * np.log(share)).sum())

    size = np.linalg.norm(base) * np.linalg.norm(update)
    left = np.linalg.norm(base @ update.T - update @ base.T) / size
    right = np.linalg.norm(base.T @ update - update.T @ base) / size
    return effective_rank(base) / (effective_rank(update) + 1e-8), (left + right) / 2


def larv_scores(contrast, conflict, depth):
    """The score of each of the blocks, in their order."""
    z = (conflict - conflict.mean()) / (conflict.std() or 1.0)
    place = np.arange(1, len(contrast) + 1) / len(contrast)
    return contrast * place**depth / (1 + np.log1p(np.exp(z)))

"""EMR-Merging and TSV-C in plain float64 NumPy, from their papers. Nothing here imports cart_hf."""

from __future__ import annotations

import numpy as np

State = dict[str, np.ndarray]


def emr(base: State, models: list[State]) -> tuple[State, list[dict[str, np.ndarray]], list[float]]:
    """Return the unified task vector, each task's masks, and the rescalers over all tensors of the base."""
    unified, masks = {}, [{} for _ in models]
    own, kept = [0.0] * len(models), [0.0] * len(models)
    for name, start in base.items():
        vectors = np.stack([model[name] - start for model in models])
        sign = np.where(vectors.sum(axis=0) > 0, 1.0, -1.0)
        unified[name] = sign * np.where(np.sign(vectors) == sign, np.abs(vectors), 0.0).max(axis=0)
        for task, vector in enumerate(vectors):
            masks[task][name] = np.sign(vector) * np.sign(unified[name]) > 0
            own[task] += np.abs(vector).sum()
            kept[task] += np.abs(unified[name][masks[task][name]]).sum()
    return unified, masks, [a / b if b else 0.0 for a, b in zip(own, kept, strict=True)]


def restored(base: State, models: list[State], task: int) -> State:
    """Return what is left of one model."""
    unified, masks, rescalers = emr(base, models)
    return {name: start + rescalers[task] * masks[task][name] * unified[name] for name, start in base.items()}


def top(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the best part of that rank."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]

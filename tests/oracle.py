"""An independent reference: every method in plain float64 NumPy, on state dicts that transformers itself loaded.

Nothing here imports cart_hf. Which tensors are decomposed is written down by name for each family.
"""

from __future__ import annotations

import re

import numpy as np
from transformers import AutoModel

State = dict[str, np.ndarray]

LOW_RANK = {
    "roberta": r"encoder\.layer\.\d+\.(attention\.(self\.(query|key|value)|output\.dense)|intermediate\.dense|output\.dense)\.weight",
    "distilbert": r"transformer\.layer\.\d+\.(attention\.(q|k|v|out)_lin|ffn\.lin[12])\.weight",
    "vit": r"layers\.\d+\.(attention\.(q_proj|k_proj|v_proj|o_proj)|mlp\.fc[12])\.weight",
    "gpt2": r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight",
    "clip": r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight",
}  # fmt: skip
LOW_RANK["bert"] = LOW_RANK["roberta"]


def state_of(folder: str, prefix: str = "") -> State:
    """Load a checkpoint's bare model with transformers, as float32 arrays."""
    model = AutoModel.from_pretrained(folder, dtype="float32")
    return {prefix + name: tensor.numpy() for name, tensor in model.state_dict().items()}


def is_low_rank(family: str, name: str) -> bool:
    return re.fullmatch(LOW_RANK[family], name) is not None


def truncate(matrix: np.ndarray, k: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vt[:k]


def energy_rank(matrix: np.ndarray, energy: float) -> int:
    s = np.linalg.svd(matrix, compute_uv=False) ** 2
    return 1 + int(np.argmax(np.cumsum(s) / s.sum() >= energy - 1e-12))


def cart_matrix(stack: np.ndarray, rank, scale: float, weights=None) -> np.ndarray:
    """CART on one matrix: `rank(D)` gives k."""
    stack = stack.astype(np.float64)
    w = np.ones(len(stack)) if weights is None else np.asarray(weights, dtype=np.float64)
    w = w / w.mean()
    centre = np.tensordot(w, stack, 1) / len(stack)
    return centre + scale * sum(wi * truncate(m - centre, rank(m - centre)) for wi, m in zip(w, stack, strict=True))


def average(stack: np.ndarray, weights=None) -> np.ndarray:
    w = np.ones(len(stack)) if weights is None else np.asarray(weights, dtype=np.float64)
    return np.tensordot(w, stack.astype(np.float64), 1) / w.sum()


def cart(
    models: list[State],
    family: str,
    scale: float,
    ratio: float | None = None,
    energy: float | None = None,
    weights=None,
) -> State:
    merged = {}
    for name in models[0]:
        stack = np.stack([m[name] for m in models])
        if is_low_rank(family, name):
            smaller = min(stack.shape[1:])
            k = (lambda d: energy_rank(d, energy)) if energy else (lambda d, s=smaller: max(1, int(ratio * s)))
            merged[name] = cart_matrix(stack, k, scale, weights)
        else:
            merged[name] = average(stack, weights)
    return merged


def task_arithmetic(base: State, models: list[State], scale: float, weights=None) -> State:
    w = weights or [1.0] * len(models)
    return {
        n: base[n] + scale * sum(wi * (m[n].astype(np.float64) - base[n]) for wi, m in zip(w, models, strict=True))
        for n in models[0]
    }


def _task_vectors(base: State, models: list[State]) -> list[State]:
    # differences of float32 numbers in float32, as any implementation stores them: the thresholds compare these
    return [{n: m[n] - base[n] for n in m} for m in models]


def ties(
    base: State, models: list[State], density: float, scale: float, per_tensor=False, mean=True, weights=None
) -> State:
    terms = ties_terms(base, models, density, per_tensor, mean, weights)
    return {n: base[n] + scale * term.sum(0) for n, term in terms.items()}


def ties_terms(base: State, models: list[State], density: float, per_tensor=False, mean=True, weights=None) -> State:
    """What is left of each task vector where its sign is the elected one, divided so that the sum is the mean."""
    taus = _task_vectors(base, models)
    w = weights or [1.0] * len(models)
    kept = []
    for tau in taus:
        flat = np.sort(np.abs(np.concatenate([t.ravel() for t in tau.values()])))
        whole = flat[max(len(flat) - int(density * len(flat)), 1) - 1]
        trimmed = {}
        for n, t in tau.items():
            threshold = whole
            if per_tensor:
                own = np.sort(np.abs(t.ravel()))
                threshold = own[min(len(own) - int(density * len(own)), len(own) - 1)]
            trimmed[n] = np.where(np.abs(t) >= threshold, t, 0).astype(np.float64)
        kept.append(trimmed)
    terms = {}
    for n in taus[0]:
        stack = np.stack([k[n] for k in kept])
        wide = np.reshape(w, (-1, *[1] * (stack.ndim - 1)))
        sign = np.where((wide * stack).sum(0) >= 0, 1, -1)
        agrees = (np.sign(stack) == sign) & (stack != 0)
        mass = (wide * agrees).sum(0)
        terms[n] = wide * stack * agrees / (np.where(mass == 0, 1, mass) if mean else 1)
    return terms


def consensus(base: State, models: list[State], scale: float, threshold: float, min_tasks: int) -> State:
    taus = _task_vectors(base, models)
    merged = {}
    for n in taus[0]:
        stack = np.stack([t[n] for t in taus]).astype(np.float64)
        total = stack.sum(0)
        votes = (np.abs(stack) > threshold * np.abs(total - stack)).sum(0)
        merged[n] = base[n] + scale * total * (votes >= min_tasks)
    return merged

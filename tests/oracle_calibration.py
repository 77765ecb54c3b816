"""An independent reference for what is measured on examples: plain transformers, torch.autograd and float64 NumPy.

Nothing here imports cart_hf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray


@torch.no_grad()
def grams(module: torch.nn.Module, names: Iterable[str], calls: Iterable[Callable[[], Any]]) -> dict[str, Array]:
    """Return X^T X / n of all the vectors that reach each named layer in some calls."""
    heard: dict[str, list[Array]] = {name: [] for name in names}
    for name, rows in heard.items():
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, x, rows=rows: rows.append(x[0].flatten(0, -2).double().numpy())
        )
    for call in calls:
        call()
    found = {name: np.concatenate(rows) for name, rows in heard.items() if rows}
    return {name: x.T @ x / len(x) for name, x in found.items()}


def fisher_diagonal(module: torch.nn.Module, answers: Sequence[Callable[[], torch.Tensor]]) -> dict[str, Array]:
    """Return mean_x sum_c p_c (d log p_c / d theta)^2, one example and one label after the other.

    :param answers: each runs the module on one example and returns its logits, shape (labels,).
    """
    names, values = zip(*module.named_parameters(), strict=True)
    total = {name: np.zeros(value.shape) for name, value in zip(names, values, strict=True)}
    for answer in answers:
        logits = answer()
        if len(logits) == 1:  # a regression: a Gaussian around the answer
            terms = [(1.0, logits[0])]
        else:
            terms = list(zip(logits.softmax(0).detach().tolist(), logits.log_softmax(0), strict=True))
        for probability, logarithm in terms:
            gradients = torch.autograd.grad(logarithm, values, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name] += probability * gradient.double().numpy() ** 2 / len(answers)
    return total


def regmean(matrices: Sequence[Array], grams: Sequence[Array], a: float, weights: Sequence[float]) -> Array:
    """Return the merged matrix, (out, in), as the paper has it."""
    reduced = [w * (a * g + (1 - a) * np.diag(np.diag(g))) for g, w in zip(grams, weights, strict=True)]
    right = sum(g @ m.T for g, m in zip(reduced, matrices, strict=True))
    return np.linalg.solve(sum(reduced), right).T


def fisher(models: Sequence[Array], information: Sequence[Array], floor: float, weights: Sequence[float]) -> Array:
    shares = [w * (f + floor) for f, w in zip(information, weights, strict=True)]
    return sum(s * m for s, m in zip(shares, models, strict=True)) / sum(shares)


def brought_to_one_norm(information: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Divide each model's information by its norm, times the harmonic mean of the norms."""
    norms = [np.sqrt(sum((f**2).sum() for f in one.values())) + 1e-6 for one in information]
    mean = len(norms) / sum(1 / norm for norm in norms)
    return [{name: f * mean / norm for name, f in one.items()} for one, norm in zip(information, norms, strict=True)]

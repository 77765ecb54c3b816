"""From logits to a task's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cart_hf.errors import UserError
from cart_hf.evaluation.results import TaskResult
from cart_hf.tasks import MEAN, REGRESSION, TaskData


def predicted(data: TaskData, logits: np.ndarray, order: Sequence[int] | None, broken: Mapping[int, str]) -> np.ndarray:
    """Return a label id (int64) or a value (float64) for each example; -1 for an image that cannot be decoded.

    :param logits: shape (examples, labels of the head).
    :param order: for each label of the data the position of its logit; None for a regression.
    :raises UserError: when logits are not finite.
    """
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise UserError(
            f"task '{data.task.name}': the model's output is not finite for {len(bad)} of {len(data)} examples; "
            "its weights are broken, or too large for --dtype"
        )
    if data.task.kind == REGRESSION:
        return logits[:, 0].astype(np.float64)
    assert order is not None
    labels: np.ndarray = logits[:, list(order)].argmax(axis=1).astype(np.int64)
    labels[list(broken)] = -1
    return labels


def scored(data: TaskData, predictions: np.ndarray, broken: Mapping[int, str], seconds: float) -> TaskResult:
    """Compute a task's metrics and its score.

    Where a task has several metrics, their mean stands beside them: for MRPC and QQP some papers report accuracy,
    others the mean of accuracy and F1.
    """
    from cart_hf.evaluation.metrics import compute

    task = data.task
    assert data.labels is not None
    metrics = compute(task.metrics, predictions, data.labels)
    if len(metrics) > 1:
        metrics[MEAN] = sum(metrics.values()) / len(metrics)
    chosen = task.score or task.metrics[0]
    score = metrics[chosen] if chosen in metrics else next(iter(metrics.values()))
    undecodable = {str(row): why for row, why in broken.items()}
    return TaskResult(metrics, score, task.scored_by, len(data), round(seconds, 3), undecodable)

"""What is minimised on unlabelled inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cart_hf.errors import UserError
from cart_hf.recipe.adaptation import Objective
from cart_hf.tasks import REGRESSION, Task


def check_objective(objective: Objective, tasks: Sequence[Task]) -> None:
    """Refuse entropy where predictions are numbers, of which it is not defined.

    :raises UserError: naming the task.
    """
    for task in tasks:
        if objective == "entropy" and task.kind == REGRESSION:
            raise UserError(
                f"task '{task.name}' is a regression, whose predictions have no entropy: "
                "use --objective self-labels, or name the other tasks with --tasks"
            )


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the Shannon entropy of each prediction, in nats, shape (examples,).

    :param logits: shape (examples, labels).
    """
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def distance(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return how far each prediction is from what the task's own model predicts, shape (examples,).

    The cross-entropy of the two distributions; of a regression (one output) the squared difference.

    :param logits, target: shape (examples, labels): the merged model's and its own model's logits.
    """
    if logits.shape[-1] == 1:
        return (logits - target).square().sum(dim=-1)
    return -(target.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def losses(task: str, logits: torch.Tensor, rows: Sequence[int], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of each example.

    :param rows: the examples' rows.
    :param targets: for each task the logits of its own model on all rows; empty: entropy.
    """
    if not targets:
        return entropy(logits)
    return distance(logits, targets[task][list(rows)].to(logits))

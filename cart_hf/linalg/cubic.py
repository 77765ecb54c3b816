"""Products of a matrix with itself, for methods that take what a task's update reads to be the task's inputs."""

from __future__ import annotations

import torch


def gram_and_cubic(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A^T A`` and ``A A^T A``, the second by way of the smaller Gram matrix.

    :param matrix: A, shape (m, n).
    :return: shapes (n, n) and (m, n).
    """
    gram = matrix.mT @ matrix
    m, n = matrix.shape
    return gram, matrix @ gram if m >= n else (matrix @ matrix.mT) @ matrix

"""WUDI-merging: the update that disturbs each task least on the inputs that its own task vector reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

_DECAY, _SQUARE_DECAY, _FLOOR = 0.9, 0.999, 1e-8  # Adam's usual ones, which the authors keep


@method(
    "wudi",
    title="WUDI",
    parameters=(
        Parameter(
            "scale", 1.0, "factor of the merged task vector", aliases=("lambda",), search=(0.5, 0.75, 1.0, 1.25, 1.5)
        ),
        Parameter(
            "solver",
            "closed",
            "closed: the regularised minimum; iterative: the authors' steps of Adam",
            kind="choice",
            choices=("closed", "iterative"),
        ),
        Parameter(
            "ridge",
            0.3,
            "closed: how strongly the sum of the task vectors holds the update, in mean eigenvalues",
            low=1e-6,
            search=(0.03, 0.1, 0.3, 1.0),
        ),
        Parameter("learning_rate", 1e-5, "iterative: Adam's step", above=0),
        Parameter("iterations", 300, "iterative: steps of Adam", kind="integer", low=1),
    ),
    summary="the update that disturbs each task least along its own task vector's inputs",
    equation="merged = base + scale * argmin_X sum_t ||(X - τ_t) τ_t^T||^2 / ||τ_t||^2,  held near sum_t τ_t",
    citation="Cheng et al., Whoever started the interference should end it (WUDI-merging, arXiv 2503.08099)",
    matrices=True,
    line=True,
)
def wudi(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    solver: Literal["closed", "iterative"] = "closed",
    ridge: float = 0.3,
    learning_rate: float = 1e-5,
    iterations: int = 300,
) -> torch.Tensor:
    """Return ``base + scale * X``, X near the minimum of ``f(X) = sum_t ||(X - τ_t) τ_t^T||_F^2 / ||τ_t||_F^2``.

    With ``G = sum_t τ_t^T τ_t / ||τ_t||^2`` and ``H = sum_t τ_t τ_t^T τ_t / ||τ_t||^2`` the gradient is
    ``2 (X G - H)``: a step costs one product, however many tasks there are.

    The minimum itself, ``H G^-1``, is ill-conditioned: X grows in directions that hardly any task reads. The authors
    stop Adam after a few steps from ``X0 = sum_t τ_t`` (``iterative``). ``closed`` says the same as a prior,
    ``argmin f(X) + mu ||X - X0||^2`` with mu = ``ridge`` times G's mean eigenvalue: ``X = (H + mu X0) (G + mu I)^-1``,
    by Cholesky. It is the default: no X as near to X0 has a lower f, it takes about a tenth of the time of 300 steps,
    and does not depend on the task vectors' scale, as steps of a fixed length do.

    Cost for m x n matrices: O(T m n min(m, n) + T m n^2) once, and O(m n^2 + n^3) to solve or O(m n^2) for each step;
    memory beside the models: G, H, X and two or three more of their size.

    :param models: shape (T, m, n), float32 or float64; overwritten.
    :param base: shape (m, n).
    :raises DecompositionError: when ``G + mu I`` cannot be factorised.
    """
    curvature, target, start = _normal_equation(models.sub_(base))
    if solver == "closed":
        update = _minimum(curvature, target, start, ridge)
    else:
        parts = (part.to(models.dtype) for part in (curvature, target, start))
        update = _descended(*parts, learning_rate=learning_rate, iterations=iterations)
    return base + update.to(models.dtype).mul_(scale)


def _normal_equation(task_vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return G (n, n), H (m, n) and the sum of the task vectors, in float64."""
    from cart_hf.linalg.cubic import gram_and_cubic
    from cart_hf.linalg.gram import widened

    start = widened(task_vectors[0]).clone().zero_()
    target, curvature = start.clone(), start.new_zeros(start.shape[1], start.shape[1])
    for task_vector in map(widened, task_vectors):
        square = float(task_vector.square().sum())
        if square > 0:  # a task that changed nothing has no inputs to be disturbed on
            gram, cubic = gram_and_cubic(task_vector)
            curvature.add_(gram, alpha=1 / square)
            target.add_(cubic, alpha=1 / square)
            start.add_(task_vector)
    return curvature, target, start


def _minimum(curvature: torch.Tensor, target: torch.Tensor, start: torch.Tensor, ridge: float) -> torch.Tensor:
    import torch

    from cart_hf.linalg.gram import DecompositionError

    trace = float(curvature.trace())  # how many tasks changed the matrix
    if trace == 0.0:
        return start
    mu = ridge * trace / len(curvature)
    curvature.diagonal().add_(mu)
    try:
        factor = torch.linalg.cholesky(curvature)
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise DecompositionError(str(failure)) from failure
    return torch.cholesky_solve(target.add_(start, alpha=mu).mT, factor).mT


def _descended(
    curvature: torch.Tensor, target: torch.Tensor, start: torch.Tensor, *, learning_rate: float, iterations: int
) -> torch.Tensor:
    """Return X after Adam's steps from ``start``, which is overwritten."""
    import torch

    mean, square, root = (torch.zeros_like(start) for _ in range(3))
    for step in range(1, iterations + 1):
        gradient = (start @ curvature).sub_(target).mul_(2.0)
        mean.lerp_(gradient, 1 - _DECAY)
        square.mul_(_SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - _SQUARE_DECAY)
        torch.sqrt(square, out=root).div_((1 - _SQUARE_DECAY**step) ** 0.5).add_(_FLOOR)
        start.addcdiv_(mean, root, value=-learning_rate / (1 - _DECAY**step))
    return start

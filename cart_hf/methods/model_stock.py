"""Model Stock: pull the average towards the base, as far as the angle between the task vectors suggests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch


@method(
    "model_stock",
    title="Model Stock",
    parameters=(
        Parameter("filter_wise", False, "an angle for each row of a tensor, not one for the tensor", kind="boolean"),
    ),
    summary="between the base and the average, by the angle between the task vectors",
    equation="merged = t * average + (1 - t) * base, t = T cos / (1 + (T - 1) cos)",
    citation="Jang et al., Model Stock (arXiv 2403.19522)",
    survey="products",
    rows=True,
)
def model_stock(
    *, models: torch.Tensor, base: torch.Tensor, products: torch.Tensor, filter_wise: bool = False
) -> torch.Tensor:
    """Return ``t average + (1 - t) base`` with ``t = T cos θ / (1 + (T - 1) cos θ)``.

    ``cos θ`` is the mean over all pairs of the cosine between two task vectors; the paper speaks of one angle, which
    all pairs share, and mergekit takes this mean too. A task vector of zeros is at right angles to all. Where the mean
    is negative t is 0: what the models have in common is then nothing, while the formula (and mergekit) would go
    beyond the base, without bounds near ``-1 / (T - 1)``. mergekit also takes small angles of very short task vectors
    (a product of norms below 1e-6) for larger ones. A tensor that one model has is that model's.
    A row is all that belongs to one index of the first dimension; mergekit's ``filter_wise`` takes single rows of a
    convolution's kernels. O(T n) for n elements, or O(T² n) ``filter_wise``, after one pass of O(T² n).

    :param models: shape (T, rows, columns), float; overwritten.
    :param base: shape (rows, columns).
    :param products: inner products of the whole tensor's task vectors, shape (T, T), float64, on the CPU.
    """
    task_vectors = models.sub_(base)
    if filter_wise:
        rows = task_vectors if models.device.type == "mps" else task_vectors.double()  # MPS has no float64
        rows = rows.movedim(0, 1)
        ratio = _ratio(rows @ rows.mT).to(models.dtype)
        return task_vectors.mean(dim=0).mul_(ratio[:, None]).add_(base)
    return task_vectors.mean(dim=0).mul_(float(_ratio(products))).add_(base)


def _ratio(products: torch.Tensor) -> torch.Tensor:
    """Return t from inner products of T task vectors, shape (..., T, T)."""
    count = products.shape[-1]
    if count == 1:
        return products.new_ones(products.shape[:-2])
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = lengths + (lengths == 0)  # what is zero has products of zero
    cosines = products / lengths[..., :, None] / lengths[..., None, :]
    pairs = cosines.sum(dim=(-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    cosine = (pairs / (count * (count - 1))).clamp(0.0, 1.0)
    return count * cosine / (1 + (count - 1) * cosine)

"""Best low-rank approximations of matrices that are given as thin products, such as LoRA's B A, without forming them.

``D_s = sum_t c_st B_t A_t`` lies in the column space of all the B and the row space of all the A. With orthonormal
bases of both (QR), ``D_s = Q (R diag(c_s) S^T) P^T``: the singular values of the small core are those of ``D_s``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cart_hf.linalg.gram import rank_for_energy
from cart_hf.linalg.low_rank import Factors

Product = tuple[torch.Tensor, torch.Tensor]
"""Two factors, shapes (m, r) and (r, n)."""


def factorize_products(
    products: Sequence[Product], coefficients: torch.Tensor, *, rank: int | None = None, energy: float | None = None
) -> Factors:
    """Return the factors of combinations of thin products, the same as :func:`cart_hf.linalg.low_rank.factorize` would.

    In float64, whose rounding needs no check; the cores are only as large as the ranks of the products together.

    :param products: T of them, of one type, on any device.
    :param coefficients: shape (S, T): the combinations.
    :param rank: k for all matrices, at least 1; give either this or ``energy``.
    :param energy: share of ``||D_s||_F^2`` to keep, in (0, 1]; k is then chosen for each matrix.
    :return: of S matrices, in the products' type; zero from where a matrix has no more directions.
    """
    dtype = products[0][0].dtype
    left = torch.cat([b.double() for b, _ in products], dim=1)
    right = torch.cat([a.double() for _, a in products])
    owner = torch.cat([torch.full((b.shape[1],), t) for t, (b, _) in enumerate(products)])
    columns, tall = torch.linalg.qr(left)
    rows, wide = torch.linalg.qr(right.T)
    weight = coefficients.double()[:, owner].to(left.device)
    u, singular, v = torch.linalg.svd((tall * weight[:, None]) @ wide.T, full_matrices=False)
    squares = singular.square().sum(dim=1).cpu()
    if energy is not None:
        kept = [rank_for_energy(values.flip(0).cpu().numpy(), energy) for values in singular.square()]
        rank = max(kept)
        beyond = torch.arange(singular.shape[1]) >= torch.tensor(kept)[:, None]
        singular = singular.masked_fill(beyond.to(singular.device), 0.0)
    k = rank or singular.shape[1]
    has_length = (singular[:, :k] > 0).to(singular.dtype)
    missing = max(0, k - singular.shape[1])
    pad = torch.nn.functional.pad
    return Factors(
        pad((columns @ u[:, :, :k]) * has_length[:, None], (0, missing)).to(dtype),
        pad(singular[:, :k], (0, missing)).to(dtype),
        pad((v[:, :k] @ rows.T) * has_length[:, :, None], (0, 0, 0, missing)).to(dtype),
        squares,
    )

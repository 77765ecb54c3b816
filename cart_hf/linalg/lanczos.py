"""Block Lanczos: the top eigenpairs of Gram matrices from matrix products, for a rank far below their size.

A block of random vectors is multiplied by the matrix again and again, every new block made orthogonal to all before
(full reorthogonalisation); in the small subspace that they span the eigenproblem is solved in float64 (Rayleigh-Ritz).
The subspace grows until the estimated error is small. Golub & Underwood (1977); Musco & Musco (arXiv 1504.05477) say
why a few blocks suffice. Everything is a product of matrices, for a batch of them at once: what a GPU does best.
"""

from __future__ import annotations

import torch

from cart_hf.linalg.eigenpairs import Eigenpairs

_SMALLEST = 192  # below, a full reduction takes no time
_BLOCKS = {8: 24, 16: 128, 32: 256, 64: 2**31}  # vectors multiplied at a time, for ranks below
_MOST = 0.6  # of the matrix's size: with a larger subspace, a full reduction is cheaper
_ASKEW = 1e-3  # most that the product of two vectors of the basis may be
_HOPELESS = 0.5  # an error at a look that further steps are not likely to mend


def suits(n: int, k: int) -> bool:
    """Whether Lanczos is the cheaper way to the top ``k`` of ``n`` eigenpairs."""
    return n >= _SMALLEST and _first(k) <= _MOST * n


def top_eigenpairs(grams: torch.Tensor, k: int, tolerance: float) -> list[Eigenpairs | None]:
    """Return the ``k`` largest eigenvalues and their eigenvectors of each matrix, or None where they do not converge.

    :param grams: shape (B, n, n), symmetric, float32, eigenvalues in [0, 1], on any device.
    :param tolerance: bound of :meth:`Eigenpairs.error`.
    """
    count, n, _ = grams.shape
    block = next(width for width, most in _BLOCKS.items() if k < most)
    looks = _looks(n, k, block)
    basis = grams.new_empty(count, looks[-1], n)
    small = grams.new_zeros(count, looks[-1], looks[-1])
    # the same start for every matrix, drawn on the CPU: the same result for everyone
    start = torch.randn(block, n, generator=torch.Generator().manual_seed(0))
    rows, coupling = _orthonormal(start.to(grams.device).expand(count, block, n))
    found: list[Eigenpairs | None] = [None] * count
    hopeless = [False] * count
    for end in range(block, looks[-1] + 1, block):
        begin = end - block
        basis[:, begin:end] = rows
        known = basis[:, :end]
        image = rows @ grams
        diagonal = image @ rows.mT
        small[:, begin:end, begin:end] = (diagonal + diagonal.mT) / 2
        # the recurrence's own terms first, then once more against everything: orthogonal to rounding
        image = image - diagonal @ rows
        if begin:
            image -= coupling.mT @ basis[:, begin - block : begin]
        image -= (image @ known.mT) @ known
        rows, coupling = _orthonormal(image)
        if end in looks:
            for i, pairs in enumerate(_ritz(small[:, :end, :end], coupling, known, k)):
                error = pairs.error() if pairs else 1.0
                if error <= tolerance:
                    found[i] = found[i] or pairs
                hopeless[i] |= error > _HOPELESS
            if all(pairs or lost for pairs, lost in zip(found, hopeless, strict=True)):
                break
        if end < looks[-1]:
            small[:, begin:end, end : end + block] = coupling
            small[:, end : end + block, begin:end] = coupling.mT
    return found


def _first(k: int) -> int:
    """Return the size of the subspace that suffices for most matrices."""
    return int(3.3 * k) + 16


def _looks(n: int, k: int, block: int) -> list[int]:
    """Return the subspace sizes at which to look whether the eigenpairs have converged."""
    most = min(max(6 * k, int(0.3 * n)), int(_MOST * n))
    return [size - size % block for size in range(_first(k), most + 1, max(16, int(0.75 * k)))]


def _orthonormal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q with orthonormal rows and the lower triangle L such that ``rows = L Q`` (Cholesky QR, twice).

    Rows that depend on each other give NaN, or rows that are not orthonormal: a look at the basis finds both.
    """
    first, _ = torch.linalg.cholesky_ex(rows @ rows.mT)
    rows = torch.linalg.solve_triangular(first, rows, upper=False)
    second, _ = torch.linalg.cholesky_ex(rows @ rows.mT)
    return torch.linalg.solve_triangular(second, rows, upper=False), first @ second


def _ritz(small: torch.Tensor, coupling: torch.Tensor, basis: torch.Tensor, k: int) -> list[Eigenpairs | None]:
    """Solve the projected eigenproblems; what the last block couples to outside the subspace is the residual."""
    small = small.cpu() if small.is_mps else small  # which has neither float64 nor eigenproblems
    # a block that one direction dominates cannot be made orthonormal in float32: then nothing here means anything
    unit = torch.eye(basis.shape[1], device=basis.device)
    sound = ((basis @ basis.mT - unit).abs().amax(dim=(1, 2)) < _ASKEW).tolist()
    try:
        values, weights = torch.linalg.eigh(small.nan_to_num(0.0, 0.0, 0.0).double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return [None] * len(basis)
    values, weights = values.flip(1), weights.flip(2).mT
    last = weights[:, :, -coupling.shape[1] :] @ coupling.to(weights)
    residuals = torch.linalg.vector_norm(last, dim=2)
    rows = weights[:, :k].to(basis) @ basis
    pairs = map(Eigenpairs, rows, values.cpu(), residuals.cpu())
    return [pair if good else None for pair, good in zip(pairs, sound, strict=True)]

"""How many directions each matrix gets where the size of the adapter is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def allot(spectra: Sequence[npt.NDArray[np.float64]], costs: Sequence[int], budget: int) -> list[int]:
    """Return a rank for each matrix, so that the summed squared error is as small as the budget allows.

    A direction with singular value s takes s^2 from the squared error (Eckart-Young), so directions are taken in the
    order of s^2 per byte until the next does not fit.

    :param spectra: the singular values of each matrix, largest first.
    :param costs: bytes of one direction of each.
    :param budget: bytes for all.
    :return: ranks, each at least 1.
    """
    matrix = np.repeat(np.arange(len(spectra)), [len(values) for values in spectra])
    gain = np.concatenate([values**2 / cost for values, cost in zip(spectra, costs, strict=True)])
    first = np.concatenate([np.arange(len(values)) == 0 for values in spectra])
    order = np.lexsort((-gain, ~first))  # the first of each matrix, then the most gain for a byte
    spent = np.cumsum(np.asarray(costs)[matrix[order]])
    taken = matrix[order[: max(len(spectra), int(np.searchsorted(spent, budget, side="right")))]]
    counted: list[int] = np.bincount(taken, minlength=len(spectra)).tolist()
    return counted

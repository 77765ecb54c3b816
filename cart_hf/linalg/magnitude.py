"""The exact k-th smallest magnitude of a stream of float32 numbers, in two passes and 256 KiB.

The bits of a non-negative float32 order as integers do, so the order statistic is found digit by digit: a histogram of
the upper 15 bits in the first pass, of the lower 16 bits inside the selected bin in the second (a radix select).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

LOW_BITS = 16


class MagnitudeHistogram:
    """Selects the k-th smallest absolute value of all the numbers it is shown, twice.

    Show every number with :meth:`add`, call :meth:`narrow`, show every number again, then read :meth:`value`.
    Histograms of several workers are joined with :meth:`join`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._bin: int | None = None
        self._rank_in_bin = 0
        self._counts: npt.NDArray[np.int64] = np.zeros(1 << 15, dtype=np.int64)

    def add(self, numbers: torch.Tensor) -> None:
        """Count ``numbers`` (any shape, converted to float32 on the CPU)."""
        bits = numbers.detach().to("cpu", torch.float32).abs().contiguous().view(torch.int32).flatten().numpy()
        high = bits >> LOW_BITS
        if self._bin is None:
            self.count += bits.size
            self._counts += np.bincount(high, minlength=len(self._counts))
        else:
            low = bits[high == self._bin] & ((1 << LOW_BITS) - 1)
            self._counts += np.bincount(low, minlength=len(self._counts))

    def fork(self) -> MagnitudeHistogram:
        """Return an empty histogram for the same pass, for another worker."""
        other = MagnitudeHistogram()
        other._bin, other._counts = self._bin, np.zeros_like(self._counts)
        return other

    def join(self, other: MagnitudeHistogram) -> None:
        """Add what ``other`` has counted."""
        self.count += other.count
        self._counts += other._counts

    @property
    def narrowed(self) -> bool:
        """Whether the second pass has started."""
        return self._bin is not None

    def narrow(self, k: int) -> None:
        """Fix the bin that holds the k-th smallest magnitude (1 <= k <= count) and start the second pass."""
        before = np.cumsum(self._counts)
        self._bin = int(np.searchsorted(before, k))
        self._rank_in_bin = k - int(before[self._bin - 1] if self._bin else 0)
        self._counts = np.zeros(1 << LOW_BITS, dtype=np.int64)

    def value(self) -> float:
        """Return the k-th smallest magnitude, exactly."""
        if self._bin is None:
            raise RuntimeError("narrow() and a second pass come first")
        low = int(np.searchsorted(np.cumsum(self._counts), self._rank_in_bin))
        return float(np.array((self._bin << LOW_BITS) | low, dtype=np.int32).view(np.float32))

"""The exact k-th smallest magnitude of a stream of float32 numbers, in two passes and little memory.

The bits of a non-negative float32 order as integers do. So a histogram of their upper halves tells where the k-th
smallest lies, and counting each number in that window tells which it is (a radix select). The first pass may be shown
a sample: its window is then wider, and the second pass tells whether the sample was right.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_LOW_BITS = 16
_WITHOUT_SIGN = np.uint32(0x7FFFFFFF)


class _Window(NamedTuple):
    """What is counted: magnitudes by their bits without the lowest ``shift``, ``size`` values from ``start`` on."""

    shift: int
    start: int
    size: int


_EVERYTHING = _Window(_LOW_BITS, 0, 1 << (31 - _LOW_BITS))


class MagnitudeHistogram:
    """Selects the k-th smallest absolute value of all the numbers it is shown.

    Show the numbers with :meth:`add`, call :meth:`narrow`, show every number again, then read :meth:`value`.
    Histograms of several workers or processes are joined with :meth:`join`.
    """

    def __init__(self) -> None:
        self._window, self._kth = _EVERYTHING, 0
        self._below = 0
        self._counts: npt.NDArray[np.int64] | None = None
        self._places: list[npt.NDArray[np.uint32]] = []  # in the window, not counted yet

    def add(self, numbers: torch.Tensor) -> None:
        """Count ``numbers`` (any shape, converted to float32 on the CPU)."""
        stored = numbers.detach().to("cpu", torch.float32).contiguous().view(torch.int32).numpy().reshape(-1)
        bits = stored.view(np.uint32) & _WITHOUT_SIGN
        shift, start, size = self._window
        if start:
            self._below += int(np.count_nonzero(bits < np.uint32(start)))
            bits -= np.uint32(start)  # what is smaller than the window wraps around to beyond it
        self._places.append(bits >> np.uint32(shift) if shift else bits[bits < np.uint32(size)])

    def fork(self) -> MagnitudeHistogram:
        """Return an empty histogram for the same pass, for another worker."""
        other = MagnitudeHistogram()
        other._window, other._kth = self._window, self._kth
        return other

    def tally(self) -> MagnitudeHistogram:
        """Count what it was shown: so many numbers at a time are worth the walk through the whole histogram."""
        if self._places:
            counts = np.bincount(np.concatenate(self._places), minlength=self._window.size)
            self._counts = counts if self._counts is None else self._counts + counts
            self._places = []
        return self

    def join(self, other: MagnitudeHistogram) -> None:
        """Add what ``other`` has counted."""
        self._below += other._below
        mine, theirs = self.tally()._counts, other.tally()._counts
        if mine is None:
            self._counts = None if theirs is None else theirs.copy()
        elif theirs is not None:
            mine += theirs

    @property
    def count(self) -> int:
        """How many numbers it was shown in the first pass."""
        counts = self.tally()._counts
        return 0 if counts is None else int(counts.sum())

    def narrow(self, k: int, margin: int = 0) -> None:
        """Fix the window that holds the k-th smallest magnitude (1 <= k <= count) and start the second pass.

        :param margin: by how many values of the upper half the window is wider, on either side.
        """
        counts = self.tally()._counts
        if counts is None:
            raise RuntimeError("add() comes first")
        before = np.cumsum(counts)
        middle = int(np.searchsorted(before, k))
        first, last = max(middle - margin, 0), min(middle + margin, _EVERYTHING.size - 1)
        self._window = _Window(0, first << _LOW_BITS, (last - first + 1) << _LOW_BITS)
        self._kth, self._counts = k, None

    def value(self, k: int | None = None) -> float | None:
        """Return the k-th smallest magnitude, exactly; None when the window does not hold it.

        :param k: default: that of :meth:`narrow`, when the first pass was shown every number.
        """
        if self._window == _EVERYTHING:
            raise RuntimeError("narrow() and a second pass come first")
        counts = self.tally()._counts
        rank = (self._kth if k is None else k) - self._below
        if counts is None or not 1 <= rank <= counts.sum():
            return None
        bits = self._window.start + int(np.searchsorted(np.cumsum(counts), rank))
        return float(np.array(bits, dtype=np.uint32).view(np.float32))

"""Best low-rank approximations and exact order statistics, knowing nothing of models."""

from cart_hf.linalg.low_rank import DecompositionError, rank_for_energy, sum_of_low_rank
from cart_hf.linalg.magnitude import MagnitudeHistogram

__all__ = ["DecompositionError", "MagnitudeHistogram", "rank_for_energy", "sum_of_low_rank"]

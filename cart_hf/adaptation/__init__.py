"""Test-time adaptation: the coefficients of a merge learnt on unlabelled inputs (AdaMerging)."""

from cart_hf.adaptation.job import Adapted
from cart_hf.adaptation.run import adapt

__all__ = ["Adapted", "adapt"]

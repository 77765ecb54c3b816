"""`cart-hf tune`: which settings of a method score best, searched from one decomposition."""

from cart_hf.tuning.run import Tried, Tuned, tune

__all__ = ["Tried", "Tuned", "tune"]

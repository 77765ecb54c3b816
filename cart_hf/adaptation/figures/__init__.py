"""An adaptation's figures, drawn with matplotlib (the extra `plot`)."""

from cart_hf.adaptation.figures.curves import curves
from cart_hf.adaptation.figures.heat_map import heat_map

__all__ = ["curves", "heat_map"]

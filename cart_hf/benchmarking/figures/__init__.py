"""A benchmark's figures, drawn with matplotlib (the extra `plot`)."""

from cart_hf.benchmarking.figures.bars import bars
from cart_hf.benchmarking.figures.radar import radar
from cart_hf.benchmarking.figures.sizes import sizes

__all__ = ["bars", "radar", "sizes"]

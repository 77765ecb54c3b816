"""`cart-hf analyze`: why a merge works or fails, in numbers, figures and one page."""

from cart_hf.analysis.frames import FRAMES, frame
from cart_hf.analysis.model import Analysis
from cart_hf.analysis.run import analyze

__all__ = ["FRAMES", "Analysis", "analyze", "frame"]

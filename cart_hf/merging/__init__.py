"""The loop: for each planned tensor read, place on a device, call the method, write in place."""

from cart_hf.merging.loop import default_workers, run
from cart_hf.merging.shares import Span

__all__ = ["Span", "default_workers", "run"]

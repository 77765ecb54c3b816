"""Conversion: the open_clip checkpoints of the papers become folders that transformers loads."""

from cart_hf.conversion.run import Converted, convert

__all__ = ["Converted", "convert"]

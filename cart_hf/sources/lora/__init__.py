"""LoRA adapters as sources: an adapter and its base become one model, computed slice by slice as it is read."""

from cart_hf.sources.lora.adapt import Model, adapt
from cart_hf.sources.lora.file import AdaptedFile, Part

__all__ = ["AdaptedFile", "Model", "Part", "adapt"]

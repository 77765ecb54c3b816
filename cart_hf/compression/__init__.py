"""Fine-tuned models stored as one centre and a LoRA adapter each, in PEFT's format."""

from cart_hf.compression.run import Compressed, compress, plan_compression

__all__ = ["Compressed", "compress", "plan_compression"]

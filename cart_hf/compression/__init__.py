"""Fine-tuned models stored as one model and a little for each: LoRA adapters in PEFT's format, or masks."""

from cart_hf.compression.masked import Masked, plan_masked
from cart_hf.compression.restoring import restore
from cart_hf.compression.run import Compressed, compress, plan_compression

__all__ = ["Compressed", "Masked", "compress", "plan_compression", "plan_masked", "restore"]

"""Sources: a reference becomes a checkpoint - read-only, lazy, with module names, headers before weights."""

from cart_hf.sources.architecture import Architecture, Block, describe, renamed
from cart_hf.sources.checkpoint import Checkpoint, fetch_weights, open_checkpoint, open_checkpoints
from cart_hf.sources.dtypes import DTYPES, dtype_name, element_size
from cart_hf.sources.fingerprint import fingerprint, tensors_fingerprint
from cart_hf.sources.weights import StoredTensor, WeightFile

__all__ = [
    "DTYPES",
    "Architecture",
    "Block",
    "Checkpoint",
    "StoredTensor",
    "WeightFile",
    "describe",
    "dtype_name",
    "element_size",
    "fetch_weights",
    "fingerprint",
    "open_checkpoint",
    "open_checkpoints",
    "renamed",
    "tensors_fingerprint",
]

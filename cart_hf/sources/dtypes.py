"""The element types of safetensors files and their torch counterparts."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a torch type.

    :raises KeyError: for a type that safetensors files cannot hold.
    """
    return _NAMES[dtype]


def element_size(name: str) -> int:
    """Return the bytes of one element of the type that safetensors calls ``name``."""
    return DTYPES[name].itemsize

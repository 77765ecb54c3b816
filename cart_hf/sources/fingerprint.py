"""A name for exactly these weights, so that what was measured on them can be found again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch

from cart_hf.recipe.reference import Reference

_BLOCK = 1 << 22  # bytes
# what a model's answers depend on: weights, configuration, tokenizer, processor
_READ = (
    "*.safetensors", "*.bin", "config.json", "tokenizer*.json", "vocab.*", "merges.txt", "*.model", "*.spm",
    "preprocessor_config.json", "processor_config.json", "adapter_config.json",
)  # fmt: skip


def fingerprint(reference: Reference, commit: str | None, folder: Path) -> str:
    """Return the Hub's id and commit, or a hash of what a local model's answers depend on."""
    if commit is not None:
        return f"{reference.path}/{reference.subfolder or ''}@{commit}"
    digest = hashlib.sha256()
    known: dict[tuple[int, int], str] = {}  # the tasks of a merge share their backbone by hard link
    for path in sorted(folder.rglob("*")):
        if any(fnmatch(path.name, pattern) for pattern in _READ):
            status = path.stat()
            file = (status.st_dev, status.st_ino)
            if file not in known:
                known[file] = _hash_of(path)
            digest.update(f"{path.relative_to(folder)} {known[file]}\n".encode())
    return digest.hexdigest()[:32]


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of a model's tensors in memory."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

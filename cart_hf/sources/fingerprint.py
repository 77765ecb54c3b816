"""A name for exactly these weights, so that what was measured on them can be found again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cart_hf.recipe.reference import Reference

_BLOCK = 1 << 22  # bytes


def fingerprint(reference: Reference, commit: str | None, folder: Path) -> str:
    """Return the Hub's id and commit, or a hash of a local folder's configurations and weights."""
    if commit is not None:
        return f"{reference.path}/{reference.subfolder or ''}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json":
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()[:32]

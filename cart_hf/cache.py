"""What is worth keeping between runs: zero-shot heads, scores of individual models, descriptions of architectures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """Return a folder of our cache: ``$CART_HF_CACHE``, or ``cart_hf`` in Hugging Face's (``HF_HOME``)."""
    from huggingface_hub import constants

    own = os.environ.get("CART_HF_CACHE")
    return (Path(own).expanduser() if own else Path(constants.HF_HOME) / "cart_hf") / name


def write_through(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see all of it or nothing; a cache that cannot be written is done without."""
    place = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(place)
            place.replace(path)
        finally:
            place.unlink(missing_ok=True)


def keep(path: Path, data: Any) -> None:
    """Write what JSON can hold, behind its hash."""
    text = json.dumps(data)
    write_through(path, lambda place: place.write_text(f"{_hash(text)}\n{text}", encoding="utf-8"))


def recall(path: Path) -> Any:
    """Return what :func:`keep` wrote, or None where there is none, or not all of it."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if digest == _hash(text) else None
    except (OSError, ValueError):
        return None


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()

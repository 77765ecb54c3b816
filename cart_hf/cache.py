"""What is worth keeping between runs: zero-shot heads and the scores of individual models."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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

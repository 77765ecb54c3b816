"""The statistics of one model in a file of our cache, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cart_hf.errors import UserError, telling

FORMAT = "cart-hf calibration 1"


@dataclass(frozen=True)
class Kept:
    """The statistics of one model.

    :param path: the file.
    :param stored: the name in the file, by the name of the model's tensor: several may share one.
    :param norms: the Frobenius norm of each statistic, by the name in the file.
    """

    path: Path
    stored: Mapping[str, str]
    norms: Mapping[str, float]

    @classmethod
    def find(cls, path: Path) -> Kept | None:
        """Open a file; None where there is none. A damaged one is as good as none."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                found = cls(path, json.loads(about["stored"]), json.loads(about["norms"]))
                whole = set(found.stored.values()) <= set(file.keys()) and about["format"] == FORMAT
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return found if whole else None

    def read(self, name: str) -> torch.Tensor:
        """Return the statistic of a tensor, on the CPU."""
        with safe_open(self.path, "pt") as file:
            found: torch.Tensor = file.get_tensor(self.stored[name])
            return found

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of a 1-D statistic, on the CPU."""
        with safe_open(self.path, "pt") as file:
            found: torch.Tensor = file.get_slice(self.stored[name])[start:stop]
            return found


def keep(path: Path, tensors: Mapping[str, torch.Tensor], who: str) -> None:
    """Write the statistics of a model; what stands under several names is written once.

    :param who: the model, for messages.
    :raises UserError: when they are not finite, or the cache cannot be written: they are too much to hold in memory.
    """
    first: dict[int, str] = {}
    stored = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    own = {name: tensors[name].cpu().contiguous() for name in dict.fromkeys(stored.values())}
    norms = {name: float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for name, tensor in own.items()}
    broken = next((name for name, norm in norms.items() if not norm < float("inf")), None)
    if broken is not None:
        raise UserError(f"calibration: {who} computes what is not finite at '{broken}': is the checkpoint broken?")
    about = {"format": FORMAT, "model": who, "stored": json.dumps(stored), "norms": json.dumps(norms)}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with telling(f"calibration: cannot write {path} (set CART_HF_CACHE to a folder with room)"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(own, draft, about)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

"""A folder of factors, one safetensors file for each matrix, named after all that decides what is in it.

A file appears in one go, so a killed run leaves what it finished, several processes may fill one folder, and no list
of contents can be wrong. Whoever asks for another rank, scale or method finds the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cart_hf.errors import UserError, telling
from cart_hf.plan import Group, Plan
from cart_hf.recipe.compression import Centre
from cart_hf.sources import Checkpoint, WeightFile

if TYPE_CHECKING:
    from cart_hf.linalg.low_rank import Factors

_FORMAT = "cart-hf factors 1"


@dataclass(frozen=True)
class Centred:
    """The matrices of one name: their centre, and the factors of what is left of each.

    :param centre: ``sum_t w_t W_t / sum_t w_t``, or the base's matrix; shape (m, n).
    :param factors: of ``W_t - centre``, in the order of the tensor's inputs.
    """

    centre: torch.Tensor
    factors: Factors


@dataclass(frozen=True)
class FactorStore:
    """A folder of factors.

    :param folder: where they are; made when the first is kept.
    :param rank_ratio: rank up to which to compute them, as a fraction of the smaller dimension; what a merge itself
        needs when that is more.
    :param centre: what the matrices are centred at: their weighted ``average``, or the ``base``'s.
    """

    folder: Path
    rank_ratio: float = 0.0
    centre: Centre = "average"

    def rank(self, group: Group, wanted: int) -> int:
        """Return the rank to compute when ``wanted`` is needed."""
        return max(wanted, int(self.rank_ratio * min(group.shape)))

    def holds(self, plan: Plan, group: Group) -> bool:
        """Whether there are factors of a matrix (or fused group), of whatever rank."""
        return self._path(plan, group).is_file()

    def load(self, plan: Plan, group: Group, device: torch.device) -> Centred | None:
        """Return what is kept of a matrix (or fused group), or None. A damaged file is as good as none."""
        from cart_hf.linalg.low_rank import Factors  # here: a merge without factors does without SciPy

        path = self._path(plan, group)
        try:
            parts = load_file(path, device=str(device))
            return Centred(
                parts["centre"],
                Factors(parts["left"], parts["singular"], parts["right"], parts["squares"].cpu()),
            )
        except (OSError, SafetensorError, KeyError):
            return None

    def of_model(self, plan: Plan, group: Group, place: int) -> Factors:
        """Return the factors of one model's matrix, all that are kept, on the CPU.

        :param place: the model's place among the inputs.
        :raises OSError: when they are not there.
        """
        from cart_hf.linalg.low_rank import Factors

        with safe_open(self._path(plan, group), "pt") as file:
            parts = (file.get_slice(name)[place : place + 1] for name in ("left", "singular", "right", "squares"))
            return Factors(*parts)

    def spectra(self, plan: Plan, group: Group) -> torch.Tensor:
        """Return the singular values that are kept of each model's matrix, largest first, shape (T, k).

        :raises OSError: when they are not there.
        """
        with safe_open(self._path(plan, group), "pt") as file:
            values: torch.Tensor = file.get_tensor("singular")
            return values

    def keep(self, plan: Plan, group: Group, centred: Centred) -> None:
        """Write what was computed.

        :raises UserError: when the folder cannot be written.
        """
        path, factors = self._path(plan, group), centred.factors
        parts = {
            "centre": centred.centre,
            "left": factors.left,
            "singular": factors.singular,
            "right": factors.right,
            "squares": factors.squares,
        }
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with telling(f"--factors: cannot write {path}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                tensors = {name: part.cpu().contiguous() for name, part in parts.items()}
                save_file(tensors, draft, self._metadata(plan, group))
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)

    def _path(self, plan: Plan, group: Group) -> Path:
        name = re.sub(r"[^A-Za-z0-9.]+", "_", group.name)[-100:]
        text = json.dumps([self._metadata(plan, group), _inputs(plan, group)], sort_keys=True, default=str)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"

    def _metadata(self, plan: Plan, group: Group) -> dict[str, str]:
        """Return what people want to know of a file, and what was done to the inputs."""
        first = group.tensors[0]
        weight = first.weights
        return {
            "format": _FORMAT,
            "tensors": json.dumps([tensor.name for tensor in group.tensors]),
            "models": json.dumps([plan.models[i].name for i, _ in first.inputs]),
            "weights": json.dumps([w / sum(weight) for w in weight]),
            "centre": json.dumps(_base_identity(plan, group) if self.centre == "base" else self.centre),
            "dtype": plan.arithmetic,
            "solver": str(first.parameters.get("solver", "fast")),
        }


def open_store(folder: Path, rank_ratio: float | None = None, centre: Centre = "average") -> FactorStore:
    """Return a user's folder of factors, which need not be there yet.

    :raises UserError: for what is no folder, or no ratio.
    """
    if rank_ratio is not None and not 0 < rank_ratio <= 1:
        raise UserError(f"--factors-rank-ratio: must be between 0 and 1, not {rank_ratio}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--factors: {folder} is not a folder")
    return FactorStore(folder, rank_ratio or 0.0, centre)


def _inputs(plan: Plan, group: Group) -> list[Any]:
    """Return what the numbers were read from: for each tensor and model the file as it is now, and the key in it."""
    return [
        [_identity(plan.models[i], name), list(tensor.shape)] for tensor in group.tensors for i, name in tensor.inputs
    ]


def _base_identity(plan: Plan, group: Group) -> list[Any]:
    assert plan.base is not None  # what "around the base" means
    return [_identity(plan.base, tensor.base_input) for tensor in group.tensors if tensor.base_input is not None]


def _identity(model: Checkpoint, name: str) -> list[Any]:
    part = model.part(name)
    found = [*_place(model, part.file), part.key]
    return found if part.change is None else [*found, *_place(model, model.tensors[name].file), *part.done]


def _place(model: Checkpoint, file: WeightFile) -> list[Any]:
    owner = model.owner_of(file)
    if owner.commit is not None:
        return [owner.place.path, owner.place.subfolder, owner.commit]
    path = file.fetch().resolve()
    status = path.stat()
    # not its header: fine-tunes of one model have one and the same
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]

"""The inputs that a model was adapted on: counted among those it is scored on, or left out of them.

They are known by their hashes, whatever the task: coefficients are learnt on the inputs of all tasks together, and
tasks that share their inputs are answered in one pass over the same rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cart_hf.errors import UserError
from cart_hf.evaluation.model import Located
from cart_hf.output.record import ADAPTATION_FOLDER, INPUTS_FILE, MERGE_FILE
from cart_hf.recipe import Reference
from cart_hf.tasks import Keep

_INPUTS = f"{ADAPTATION_FOLDER}/{INPUTS_FILE}"


def adapted_inputs(located: Located) -> np.ndarray | None:
    """Return the hashes of the inputs that a model was adapted on, int64, sorted; None when it was not adapted.

    :raises UserError: when their file is damaged, or cannot be had from the Hub.
    """
    folder, reference = located.folder, located.reference
    of_a_task = folder.parent.name == "tasks"  # one head on the backbone of all
    if of_a_task:
        folder, reference = folder.parents[1], replace(reference, subfolder=None)
    path: Path | None = folder / _INPUTS
    if located.commit is not None and located.kind != "merged" and (of_a_task or (folder / MERGE_FILE).is_file()):
        path = _from_hub("model", replace(reference, revision=located.commit))  # only weights were downloaded
    return _read(path) if path is not None and path.is_file() else None


def inputs_of(adapted: str) -> np.ndarray:
    """Return the hashes of the inputs that an adapted model was adapted on, int64, sorted.

    :param adapted: a folder that ``cart-hf adapt`` wrote, or such a repository on the Hub.
    :raises UserError: when it is not one.
    """
    try:
        reference = Reference.parse(adapted)
    except ValueError as failure:
        raise UserError(f"--unseen-by: {failure}") from failure
    path = Path(reference.path) / _INPUTS if reference.is_local else _from_hub("--unseen-by", reference)
    if path is None or not path.is_file():
        raise UserError(
            f"--unseen-by {adapted}: it has no {_INPUTS}, which lists the inputs that a model was adapted on; "
            "name a model that `cart-hf adapt` wrote"
        )
    return _read(path)


def unseen(inputs: np.ndarray, where: str) -> Keep:
    """Return what keeps the inputs that are not among ``inputs``.

    :param where: whose examples they are, for people.
    """

    def keep(hashes: np.ndarray) -> np.ndarray:
        wanted = ~np.isin(hashes, inputs)
        if not wanted.any():
            raise UserError(
                f"{where}: the model of --unseen-by was adapted on all {len(hashes)} examples; score another split "
                "(--split), or adapt on a part of this one"
            )
        return wanted

    return keep


def _from_hub(name: str, reference: Reference) -> Path | None:
    """Download the file; None when the repository has none."""
    from cart_hf.sources.download import download
    from cart_hf.sources.hub import open_repository

    file = open_repository(name, reference).files.get(_INPUTS)
    return None if file is None else download(file)


def _read(path: Path) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        inputs = load_file(path)
    except (OSError, SafetensorError) as failure:
        raise UserError(f"cannot read {path}: {failure}") from failure
    if any(hashes.dtype != np.int64 for hashes in inputs.values()):
        raise UserError(f"{path} is damaged: it does not hold hashes of inputs (int64)")
    return np.unique(np.concatenate([hashes.ravel() for hashes in inputs.values()] or [np.empty(0, np.int64)]))

"""What the cards tell of coefficients that were learnt, and what of their file others may see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.output.record import ADAPTATION_FOLDER, COEFFICIENTS_FILE, INPUTS_FILE
from cart_hf.plan.coefficients import ABOUT
from cart_hf.tables import Table, markdown
from cart_hf.tasks import find_tasks, known_among

_OBJECTIVES = {
    "entropy": "the entropy of the merged model's predictions",
    "self-labels": "the difference between the merged model's predictions and those of each task's own model",
}
GRANULARITIES = {"task": "each task", "layer": "each task and layer", "tensor": "each task and tensor"}
_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
_IMAGES = {"coefficients.png": "λ of each task", "curves.png": "loss over the steps"}
_FILES = {
    COEFFICIENTS_FILE: "the coefficients",
    INPUTS_FILE: "hashes of the inputs, by which `cart-hf evaluate` knows them again, and not the inputs themselves",
}


def described(adaptation: Mapping[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """Return what a card tells of an adaptation.

    :param adaptation: as ``merge.json`` has it.
    :param folder: where its figures lie.
    """
    if not adaptation:
        return None
    inside = folder / ADAPTATION_FOLDER
    return {
        **adaptation,
        "minimised": _OBJECTIVES.get(adaptation["objective"], adaptation["objective"]),
        "each": GRANULARITIES.get(adaptation["granularity"], adaptation["granularity"]),
        "optimizer": _OPTIMIZERS.get(adaptation["optimizer"], adaptation["optimizer"]),
        "table": markdown(_table(adaptation["tasks"])),
        "images": {f"{ADAPTATION_FOLDER}/{name}": text for name, text in _IMAGES.items() if (inside / name).is_file()},
        "files": {f"{ADAPTATION_FOLDER}/{name}": text for name, text in _FILES.items() if (inside / name).is_file()},
    }


def public(adaptation: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without the places of inputs, but for the data sets that built-in tasks declare.

    The others are files of the machine, or data sets that may be private.
    """
    tasks = {
        name: {key: value for key, value in told.items() if key != "source" or _is_declared(name, value)}
        for name, told in adaptation["tasks"].items()
    }
    return {**adaptation, "tasks": tasks}


def public_coefficients(data: bytes, adaptation: Mapping[str, Any]) -> bytes:
    """Return the coefficients' file with another record in its metadata.

    :param data: a safetensors file: the header's length, the header, the numbers.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.get("__metadata__", {})
    about = json.loads(metadata.get(ABOUT, "{}"))
    if about.get("record", adaptation) == adaptation:
        return data
    metadata[ABOUT] = json.dumps({**about, "record": adaptation})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def _table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return one row for each task: how many inputs of which split, and where they came from."""
    held_out = any(told["held_out"] for told in tasks.values())
    rows = [
        [
            name,
            str(told["inputs"]),
            *([str(told["held_out"])] if held_out else []),
            told["split"],
            f"`{told['source']}`" if "source" in told else "not named here",
        ]
        for name, told in tasks.items()
    ]
    return Table(["task", "inputs", *(["held out"] if held_out else []), "split", "of"], rows, words=2)


def _is_declared(task: str, source: str) -> bool:
    """Whether a task is built in, and a source, such as ``nyu-mll/glue (sst2)``, is the data set that it declares."""
    dataset = find_tasks([task])[0].dataset if known_among([task]) else None
    return dataset is not None and source.partition("@")[0].partition(" (")[0] == dataset.path

"""`cart_hf.restore`: one task's model, as a plain transformers folder, from what EMR-Merging stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cart_hf.api import resolved_target
from cart_hf.compression.masks import BITS, MASKS_FOLDER, RESCALER, UNIFIED_FOLDER, WHOLE
from cart_hf.errors import UserError, did_you_mean, telling
from cart_hf.merging.reading import is_finite
from cart_hf.output import WorkFolder, check_target
from cart_hf.output.record import COMPRESS_FILE, RECIPE_FILE
from cart_hf.output.unfinished import cannot_write
from cart_hf.plan.model import CHUNK
from cart_hf.recipe import Reference
from cart_hf.sources import DTYPES, Checkpoint, StoredTensor, open_checkpoint
from cart_hf.sources.weights import SafetensorsFile


@dataclass(frozen=True)
class _Task:
    """What a task's weights are made from.

    :param base: the pretrained model.
    :param names: its name of each masked tensor, by the tensor's key in the unified model.
    :param files: the task's mask file, or files, by the keys in them.
    :param rescaler: what the masked task vector is multiplied with.
    """

    base: Checkpoint
    names: Mapping[str, str]
    files: Mapping[str, SafetensorsFile]
    rescaler: float


def restore(folder: str | Path, task: str, output: str | Path, *, base: str | None = None) -> Path:
    """Write one task's model of an EMR-Merging folder: ``base + rescaler * mask * unified task vector``, and its head.

    Tensors are read, computed and written a slice at a time: memory does not depend on the model's size.

    :param folder: what ``cart_hf.compress(form="emr")`` wrote.
    :param task: whose model.
    :param output: folder to write; it must not exist. Transformers and :func:`cart_hf.evaluate` load it.
    :param base: where the base is now, if not where it was.
    :return: the output's absolute path.
    :raises UserError: when the folder is no such output, has no such task, or the base is not to be had.
    """
    source, target = Path(folder).expanduser(), resolved_target(output)
    check_target(target, overwrite=False)
    record = _record(source)
    if task not in record["tasks"]:
        raise UserError(f"{source} has no task '{task}'{did_you_mean(task, record['tasks'])}")
    found = _task(source, record, task, base)
    own = source / UNIFIED_FOLDER / "tasks" / task
    with WorkFolder(target, overwrite=False) as place, telling(cannot_write(target)):
        for path in (own if own.is_dir() else source / UNIFIED_FOLDER).iterdir():
            if path.is_file():
                shutil.copyfile(path, place / path.name)
                if path.suffix == ".safetensors":
                    _overwrite(place / path.name, found)
    return target


def _record(folder: Path) -> dict[str, Any]:
    path = folder / COMPRESS_FILE
    with telling(f"cannot read {path}"):
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("form") != "emr":
        raise UserError(f"{folder} holds no masks of EMR-Merging: name a folder that cart-hf compress --form emr wrote")
    return dict(record)


def _task(folder: Path, record: Mapping[str, Any], task: str, base: str | None) -> _Task:
    files: dict[str, SafetensorsFile] = {}
    for path in sorted((folder / MASKS_FOLDER / task).glob("*.safetensors")):
        file = SafetensorsFile.open(path)
        files |= dict.fromkeys(file.tensors, file)
    if RESCALER.key not in files:
        raise UserError(f"{folder / MASKS_FOLDER / task} holds no mask: copy or download it again")
    rescaler = float(files[RESCALER.key].read(RESCALER.key, 0, 1))
    return _Task(_base(folder, base), record["base_tensors"], files, rescaler)


def _base(folder: Path, named: str | None) -> Checkpoint:
    written = named or yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))["base_model"]
    try:
        base = open_checkpoint("base", Reference.from_yaml(written))
        base.fetch()
    except (UserError, ValueError) as failure:
        raise UserError(
            f"the base that {folder} was made from: {failure}; --base REF says where it is now"
        ) from failure
    return base


def _overwrite(path: Path, task: _Task) -> None:
    """Turn the tensors of a copy of the unified model into the task's."""
    file = SafetensorsFile.open(path)
    with path.open("r+b") as out:
        data_start = 8 + int.from_bytes(out.read(8), "little")
        for key, stored in file.tensors.items():
            if WHOLE + key not in task.files and key not in task.names:
                continue  # a head, or what nobody changes
            out.seek(data_start + stored.start)
            for start in range(0, stored.elements, CHUNK):
                values = _values(file, key, stored, start, min(start + CHUNK, stored.elements), task)
                rounded = values.to(DTYPES[stored.dtype])
                if not is_finite(rounded):
                    raise UserError(f"tensor '{key}': the restored values do not fit {stored.dtype}")
                out.write(rounded.view(torch.uint8).numpy().data)


def _values(file: SafetensorsFile, key: str, stored: StoredTensor, start: int, stop: int, task: _Task) -> torch.Tensor:
    """Return elements ``start`` to ``stop`` of a task's tensor, 1-D."""
    values: torch.Tensor
    if WHOLE + key in task.files:
        values = task.files[WHOLE + key].read(WHOLE + key, start, stop)
        return values
    exact = torch.float64 if stored.dtype == "F64" else torch.float32
    base, values = torch.empty(2, stop - start, dtype=exact).unbind()
    task.base.read_into(base, task.names[key], start)
    if BITS + key not in task.files:  # the task's model has no such tensor
        return base
    file.read_into(values, key, start)
    packed = task.files[BITS + key].read(BITS + key, start // 8, -(-stop // 8))
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=stop - start))
    return values.sub_(base).mul_(bits).mul_(task.rescaler).add_(base)

"""A checkpoint: its configuration, its architecture and its tensors by module name, weights unread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cart_hf.errors import UserError, shorten
from cart_hf.recipe.reference import Reference
from cart_hf.sources.architecture import Architecture, describe
from cart_hf.sources.layout import local_weight_files
from cart_hf.sources.weights import StoredTensor, WeightFile


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a checkpoint.

    :param key: its key in the file.
    :param slot: the architecture's slot it fills (several share one where transformers fuses experts).
    :param stored: its header entry.
    :param file: the file that holds it.
    """

    key: str
    slot: str
    stored: StoredTensor
    file: WeightFile


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened: headers and configuration read, weights not.

    :param name: the task's name, or ``base``.
    :param reference: where it came from.
    :param commit: the Hub commit it was resolved to, or None for a local folder.
    :param folder: local folder with its small files (config, tokenizer, processor).
    :param config: its ``config.json``.
    :param architecture: its model class on the meta device.
    :param tensors: its tensors by module name; tied copies and tensors its class has no room for are left out.
    :param ignored: file keys that were left out because the class has no room for them.
    :param files: its weight files by name.
    """

    name: str
    reference: Reference
    commit: str | None
    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    tensors: Mapping[str, FileTensor]
    ignored: tuple[str, ...]
    files: Mapping[str, WeightFile] = field(repr=False)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of the flattened tensor ``name``, 1-D, in the stored type."""
        tensor = self.tensors[name]
        return tensor.file.read(tensor.key, start, tensor.stored.elements if stop is None else stop)

    def fetch(self) -> None:
        """Download the weight files that are not on this machine yet."""
        for file in self.files.values():
            file.fetch()


def open_checkpoint(name: str, reference: Reference) -> Checkpoint:
    """Open a local folder or a Hub repository without reading weights.

    :param name: what to call it in messages: the task's name, or ``base``.
    :raises UserError: when there is no such model, or its configuration, header or files are wrong.
    """
    if reference.is_local:
        folder = Path(reference.path).expanduser().resolve()
        folder = folder / reference.subfolder if reference.subfolder else folder
        if not folder.is_dir():
            raise UserError(f"{name}: {folder} is not a folder")
        config, files, commit = _read_config(name, folder, str(folder)), local_weight_files(folder), None
    else:
        from cart_hf.sources.hub import open_repository

        folder, commit, files_of = open_repository(name, reference)
        config = _read_config(name, folder, str(reference))
        files = files_of()
    label = f"{name} ({reference})"
    architecture, bare = describe(config, label), describe(config, label, bare=True)
    tensors, ignored = _by_module_name(name, architecture, bare, files)
    return Checkpoint(name, reference, commit, folder, config, architecture, tensors, tuple(ignored), files)


def _read_config(name: str, folder: Path, label: str) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: {label} is a PEFT adapter, which cart-hf cannot merge yet; merge it into its base first "
            "(PEFT: merge_and_unload, save_pretrained) and name that folder"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{name}: {label} has no config.json; is it a model folder (save_pretrained)?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise UserError(f"{name}: config.json of {label} is not valid JSON ({failure})") from failure
    if not isinstance(config, dict):
        raise UserError(f"{name}: config.json of {label} is not a JSON object")
    return config


def _by_module_name(
    name: str, architecture: Architecture, bare: Architecture, files: Mapping[str, WeightFile]
) -> tuple[dict[str, FileTensor], list[str]]:
    """Name every file tensor as the architecture does, and set aside those it has no room for.

    :raises UserError: naming every tensor whose shape is not what ``config.json`` says.
    """
    room = _room(architecture, bare)
    tensors: dict[str, FileTensor] = {}
    copies: dict[str, FileTensor] = {}
    ignored: list[str] = []
    problems: list[str] = []
    names = architecture.module_names(key for file in files.values() for key in file.tensors)
    for file in files.values():
        for key, stored in file.tensors.items():
            module_name, slot = names[key]
            tensor = FileTensor(key, slot, stored, file)
            if slot not in room:
                ignored.append(key)
            elif slot in architecture.tied:
                copies.setdefault(architecture.tied[slot], tensor)
            elif module_name == slot and stored.shape != room[slot]:
                problems.append(
                    f"{name}: tensor '{key}' has shape {list(stored.shape)}, config.json says {list(room[slot])}"
                )
            else:
                tensors[module_name] = tensor
    for owner, copy in copies.items():
        tensors.setdefault(owner, FileTensor(copy.key, owner, copy.stored, copy.file))
    if problems:
        raise UserError(problems[:3] + ([f"{name}: and {len(problems) - 3} more tensors"] if len(problems) > 3 else []))
    if not tensors:
        found = f"none of its tensors ({shorten(ignored)}) belongs to" if ignored else "its files hold no tensor of"
        raise UserError(f"{name}: {found} {architecture.class_name}; is config.json the model's own?")
    return tensors, ignored


def _room(architecture: Architecture, bare: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes a file may fill: those of the class, and those its bare model would have.

    bert-base-uncased says BertForMaskedLM, which has no pooler, but its file holds the one that classifiers start from.
    """
    room = {slot: parameter.shape for slot, parameter in architecture.slots.items()}
    for path, here in bare.path_of(architecture).items():
        if path and not here:
            room |= {f"{path}.{slot}": parameter.shape for slot, parameter in bare.slots.items()}
    return room

"""A checkpoint: its configuration, its architecture and its tensors by module name, weights unread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cart_hf.errors import UserError, shorten
from cart_hf.recipe.reference import Reference
from cart_hf.sources.architecture import Architecture, describe
from cart_hf.sources.download import RemoteFile
from cart_hf.sources.fetch import download_all
from cart_hf.sources.layout import local_weight_files
from cart_hf.sources.weights import StoredTensor, WeightFile

if TYPE_CHECKING:
    from cart_hf.parallel import Progress

Result = TypeVar("Result")

_OPENED_AT_A_TIME = 4  # models; the client takes several connections for each


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

    def read_into(self, out: torch.Tensor, name: str, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, CPU, any type) with the flattened tensor's elements from ``start`` on."""
        tensor = self.tensors[name]
        tensor.file.read_into(out, tensor.key, start)

    def will_need(self, name: str, start: int, stop: int) -> None:
        """Have the system read elements ``start`` to ``stop`` of a tensor into its cache, where it can."""
        tensor = self.tensors[name]
        tensor.file.will_need(tensor.key, start, stop)

    def fetch(self, progress: Progress | None = None) -> None:
        """Download the weight files that are not on this machine yet."""
        fetch_weights([self], progress)


@dataclass(frozen=True)
class _Located:
    """A model whose weight files were not opened yet.

    :param pickles: those that must be downloaded to be opened.
    """

    name: str
    reference: Reference
    commit: str | None
    folder: Path
    config: dict[str, Any]
    open_files: Callable[[], dict[str, WeightFile]]
    pickles: Sequence[RemoteFile] = ()


def open_checkpoint(name: str, reference: Reference) -> Checkpoint:
    """Open a local folder or a Hub repository without reading weights.

    :param name: what to call it in messages: the task's name, or ``base``.
    :raises UserError: when there is no such model, or its configuration, header or files are wrong.
    """
    (checkpoint,) = open_checkpoints([(name, reference)])
    return checkpoint


def open_checkpoints(models: Sequence[tuple[str, Reference]], progress: Progress | None = None) -> list[Checkpoint]:
    """Open several models without reading weights; what is asked of the Hub is asked for several at a time.

    :param models: what to call each in messages, and where it is.
    :param progress: called while pickles are downloaded: their headers cannot be read without them.
    :raises UserError: with the first problem of every model; no pickle is downloaded when another model has one.
    """
    with ThreadPoolExecutor(_OPENED_AT_A_TIME) as pool:
        located = list(pool.map(lambda model: _attempt(_locate, *model), models))
        problems = [one.problems if isinstance(one, UserError) else [] for one in located]
        found: dict[int, Checkpoint] = {}
        waiting = {i: one for i, one in enumerate(located) if isinstance(one, _Located) and one.pickles}
        ready = {i: one for i, one in enumerate(located) if isinstance(one, _Located) and not one.pickles}
        for batch in (ready, waiting):
            if batch is waiting and any(problems):
                break
            download_all((file for one in batch.values() for file in one.pickles), progress)
            headers = pool.map(lambda one: _attempt(one.open_files), batch.values())
            for (i, one), files in zip(batch.items(), headers, strict=True):  # described while others are opened
                checkpoint = files if isinstance(files, UserError) else _attempt(_describe, one, files)
                if isinstance(checkpoint, UserError):
                    problems[i] = checkpoint.problems
                else:
                    found[i] = checkpoint
    if any(problems):
        raise UserError([problem for of_one in problems for problem in of_one])
    return [found[i] for i in range(len(models))]


def fetch_weights(
    checkpoints: Iterable[Checkpoint], progress: Progress | None = None, *, beside: tuple[Path, int] | None = None
) -> None:
    """Download the weight files of several models that are not on this machine yet.

    :param progress, beside: see :func:`cart_hf.sources.fetch.download_all`.
    :raises UserError: when there is no room, or a file cannot be had.
    """
    files = (file.remote for checkpoint in checkpoints for file in checkpoint.files.values())
    download_all((file for file in files if file is not None), progress, beside=beside)


def _attempt(work: Callable[..., Result], *arguments: Any) -> Result | UserError:
    try:
        return work(*arguments)
    except UserError as failure:
        return failure


def _locate(name: str, reference: Reference) -> _Located:
    """Find a model's files, and read its configuration."""
    if reference.is_local:
        folder = Path(reference.path).expanduser().resolve()
        folder = folder / reference.subfolder if reference.subfolder else folder
        if not folder.is_dir():
            raise UserError(f"{name}: {folder} is not a folder")
        config = _read_config(name, folder, str(folder))
        return _Located(name, reference, None, folder, config, lambda: local_weight_files(folder))
    from cart_hf.sources.hub import open_repository

    found = open_repository(name, reference)
    config = _read_config(name, found.folder, str(reference))
    pickles = found.missing_pickles()
    return _Located(name, reference, found.commit, found.folder, config, found.weight_files, pickles)


def _describe(one: _Located, files: dict[str, WeightFile]) -> Checkpoint:
    """Build a model's class and name the tensors of its files."""
    label = f"{one.name} ({one.reference})"
    architecture, bare = describe(one.config, label), describe(one.config, label, bare=True)
    tensors, ignored = _by_module_name(one.name, architecture, bare, files)
    return Checkpoint(
        one.name, one.reference, one.commit, one.folder, one.config, architecture, tensors, tuple(ignored), files
    )


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

"""A checkpoint: its configuration, its architecture and its tensors by module name, weights unread.

A LoRA adapter is one too: its tensors are those of its base, with the adapter's on top, see `adapter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cart_hf.errors import UserError, shorten
from cart_hf.recipe.reference import Reference
from cart_hf.sources.architecture import Architecture, describe
from cart_hf.sources.fetch import download_all
from cart_hf.sources.fingerprint import fingerprint
from cart_hf.sources.locate import CONFIG, Located, attempt, locate, read_config, with_bases
from cart_hf.sources.lora import AdaptedFile, Model, Part, adapt
from cart_hf.sources.weights import FileTensor, WeightFile

if TYPE_CHECKING:
    from cart_hf.parallel import Progress

_OPENED_AT_A_TIME = 4  # models; the client takes several connections for each


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened: headers and configuration read, weights not.

    :param name: the task's name, or ``base``.
    :param reference: where it came from.
    :param commit: the Hub commit it was resolved to (an adapter's own), or None for a local folder.
    :param folder: local folder with its small files (config, tokenizer, processor).
    :param config: its ``config.json``; an adapter's is the base's, or that of the class with the adapter's head.
    :param architecture: its model class on the meta device.
    :param tensors: its tensors by module name; tied copies and tensors its class has no room for are left out.
    :param ignored: file keys that were left out because the class has no room for them.
    :param files: its weight files by name; those of an adapter's base are called ``base/NAME``.
    :param adapts: the base that it is an adapter of; several adapters share one.
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
    adapts: Checkpoint | None = None

    @property
    def place(self) -> Reference:
        """Where its own files are: an adapter's without its base."""
        return self.reference.adapter or self.reference

    @property
    def pinned(self) -> Reference:
        """Its reference with the commits that were used; an adapter's with its base."""
        own = replace(self.place, revision=self.commit or self.place.revision)
        return own if self.adapts is None else replace(self.adapts.pinned, adapter=own)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its small files are; the base's folder comes after an adapter's."""
        return (self.folder,) if self.adapts is None else (self.folder, *self.adapts.folders)

    def fingerprint(self) -> str:
        """Return a name for exactly these weights: an adapter's, and its base's."""
        own = fingerprint(self.place, self.commit, self.folder)
        return own if self.adapts is None else f"{own} on {self.adapts.fingerprint()}"

    def owner_of(self, file: WeightFile) -> Checkpoint:
        """Return whose file it is: this checkpoint, or the base that it adapts."""
        return self.adapts if self.adapts is not None and file in self.adapts.files.values() else self

    def part(self, name: str) -> Part:
        """Return what a tensor is read from, and what an adapter does to it."""
        tensor = self.tensors[name]
        if isinstance(tensor.file, AdaptedFile):
            return tensor.file.parts[tensor.key]
        return Part(tensor.stored, tensor.file, tensor.key)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what an adapter adds to its base's matrix ``name``, see :meth:`AdaptedFile.factors`.

        :return: None when it adds nothing, or replaces the matrix.
        """
        tensor = self.tensors[name]
        return tensor.file.factors(tensor.key) if isinstance(tensor.file, AdaptedFile) else None

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
        located = list(pool.map(lambda model: attempt(locate, *model), models))
        located, base_of = with_bases(pool, located)
        problems = [one.problems if isinstance(one, UserError) else [] for one in located]
        found: dict[int, Checkpoint] = {}
        adapters: dict[int, tuple[Located, dict[str, WeightFile]]] = {}
        waiting = {i: one for i, one in enumerate(located) if isinstance(one, Located) and one.pickles}
        ready = {i: one for i, one in enumerate(located) if isinstance(one, Located) and not one.pickles}
        for batch in (ready, waiting):
            if batch is waiting and any(problems):
                break
            download_all((file for one in batch.values() for file in one.pickles), progress)
            headers = pool.map(lambda one: attempt(one.open_files), batch.values())
            for (i, one), files in zip(batch.items(), headers, strict=True):  # described while others are opened
                if isinstance(files, dict) and i in base_of:
                    adapters[i] = one, files
                    continue
                checkpoint = files if isinstance(files, UserError) else attempt(_describe, one, files)
                if isinstance(checkpoint, UserError):
                    problems[i] = checkpoint.problems
                else:
                    found[i] = checkpoint
        for i, (one, files) in adapters.items():
            if base_of[i] in found:
                checkpoint = attempt(_adapt, one, files, found[base_of[i]])
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


def _describe(one: Located, files: dict[str, WeightFile]) -> Checkpoint:
    """Build a model's class and name the tensors of its files."""
    architecture, bare = describe(one.config, one.label), describe(one.config, one.label, bare=True)
    tensors, ignored = _by_module_name(one.name, architecture, bare, files)
    return Checkpoint(
        one.name, one.reference, one.commit, one.folder, one.config, architecture, tensors, tuple(ignored), files
    )


def _adapt(one: Located, files: dict[str, WeightFile], base: Checkpoint) -> Checkpoint:
    """Put an adapter on its base."""
    (file,) = files.values()
    config = read_config(one.name, one.folder, one.label, CONFIG) if (one.folder / CONFIG).is_file() else {}
    on = Model(str(base.reference), base.config, base.architecture, base.tensors)
    model = adapt(one.label, one.config, config, file, on)
    return Checkpoint(
        one.name,
        one.reference,
        one.commit,
        one.folder,
        model.config,
        model.architecture,
        model.tensors,
        (),  # what does not fit is refused
        {**files, **{f"base/{name}": file for name, file in base.files.items()}},
        base,
    )


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

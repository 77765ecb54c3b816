"""A LoRA adapter and its base, seen as one model: which tensors it has, and what each is read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cart_hf.errors import UserError
from cart_hf.sources.architecture import Architecture, renamed
from cart_hf.sources.lora.classes import Resolved, Trained, resolve
from cart_hf.sources.lora.file import AdaptedFile, Part
from cart_hf.sources.lora.settings import LoraSettings
from cart_hf.sources.lora.tensors import Change, changes_of
from cart_hf.sources.weights import FileTensor, StoredTensor, WeightFile


@dataclass(frozen=True)
class Model:
    """A model's class and tensors.

    :param label: what to call it in messages.
    :param config: its ``config.json``.
    :param architecture: its class.
    :param tensors: its tensors by module name.
    """

    label: str
    config: dict[str, Any]
    architecture: Architecture
    tensors: Mapping[str, FileTensor]


def adapt(label: str, settings: Mapping[str, Any], config: Mapping[str, Any], file: WeightFile, base: Model) -> Model:
    """Put an adapter on its base; the weights of neither are read.

    :param label: the adapter, for messages.
    :param settings: its ``adapter_config.json``.
    :param config: the ``config.json`` beside it; empty when there is none.
    :param file: its weights.
    :raises UserError: when cart-hf cannot compute what it does, or it does not fit the base.
    """
    changes = changes_of(label, file.tensors, LoraSettings.read(label, settings))
    trained = Trained(label, settings, config, file.tensors, changes)
    found = resolve(trained, base.label, base.config, base.architecture, base.tensors)
    changes = _without_copies(label, found)
    body = _body(found.architecture, base)
    places = {name: (key, slot) for name, (key, slot, _) in body.items()} | {
        name: (name, name) for name in changes if name not in body
    }
    parts: dict[str, Part] = {}
    for name, (key, slot) in places.items():
        source = body[name][2] if name in body else None
        if name in changes:
            transposed = slot in found.architecture.slots and found.architecture.slots[slot].transposed
            parts[key] = _changed(f"{label}: '{name}'", file, changes[name], source, transposed=transposed)
        elif source is not None and source.key != key:
            parts[key] = Part(source.stored, source.file, source.key)
    adapted = AdaptedFile(label, file, parts)
    tensors = {
        name: FileTensor(key, slot, parts[key].stored, adapted) if key in parts else body[name][2]
        for name, (key, slot) in places.items()
    }
    return Model(label, found.config, found.architecture, tensors)


def _body(architecture: Architecture, base: Model) -> dict[str, tuple[str, str, FileTensor]]:
    """Return the base's tensors that a class has room for, by their names there: key, slot, and the tensor.

    The keys are such as the class would have in a file: what is merged is written under them.
    """
    if architecture is base.architecture:
        return {name: (tensor.key, tensor.slot, tensor) for name, tensor in base.tensors.items()}
    paths = architecture.path_of(base.architecture)
    prefix = f"{paths['']}." if paths.get("") else ""
    found = {}
    for name, tensor in base.tensors.items():
        here, slot = renamed(name, paths), renamed(tensor.slot, paths)
        if here is None or slot is None or slot not in architecture.slots or slot in architecture.tied:
            continue
        if here == slot and tensor.stored.shape != architecture.slots[slot].shape:  # another head's
            continue
        key = tensor.key if tensor.key.startswith(prefix) else prefix + tensor.key
        found[here] = (key, slot, tensor)
    return found


def _changed(what: str, file: WeightFile, change: Change, source: FileTensor | None, *, transposed: bool) -> Part:
    """Return a tensor that an adapter replaces, or adds to; ``source`` is the base's.

    :raises UserError: when it adds to what the base does not have.
    """
    if change.replaced is not None:
        stored = file.tensors[change.replaced]
        dtype = source.stored.dtype if source is not None and source.stored.is_floating else stored.dtype
        return Part(StoredTensor(dtype, stored.shape), file, change.replaced, change, transposed or change.table)
    if source is None:
        raise UserError(f"{what} is added to (tensor '{change.keys[0]}'), but the base's files do not hold it")
    return Part(source.stored, source.file, source.key, change, transposed or change.table)


def _without_copies(label: str, found: Resolved) -> dict[str, Change]:
    """Return the changes without those of tied copies, which PEFT saves beside the tensor that they are copies of.

    :raises UserError: when a copy is changed alone: the class has one tensor for both.
    """
    kind, tied = found.architecture.class_name, found.architecture.tied
    for name, change in found.changes.items():
        owner = found.changes.get(tied.get(name, name))
        if name in tied and (change.replaced is None or owner is None or owner.replaced is None):
            raise UserError(
                f"{label}: tensor '{change.keys[0]}' changes '{name}' alone, which {kind} ties to '{tied[name]}'; "
                "merge the adapter into its base first (PEFT: merge_and_unload, save_pretrained)"
            )
    return {name: change for name, change in found.changes.items() if name not in tied}

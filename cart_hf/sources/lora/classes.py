"""Which class a LoRA adapter makes of its base, and which of that class's tensors it changes.

An adapter without a head of its own leaves the base what it is, even when it was trained on a part of it (CLIP's vision
tower). One that brings a head was trained as another class, over the base's body.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cart_hf.errors import UserError, shorten
from cart_hf.sources.architecture import Architecture, describe, task_class
from cart_hf.sources.lora.tensors import Change
from cart_hf.sources.weights import StoredTensor

_LABELS = ("id2label", "label2id", "num_labels", "problem_type")
_MOST_MISFITS = 3


@dataclass(frozen=True)
class Resolved:
    """An adapted model's class, and what changes in it.

    :param config, architecture: the base's own, or those of the class with the adapter's head.
    :param changes: what the adapter does to its tensors, by their names.
    """

    config: dict[str, Any]
    architecture: Architecture
    changes: dict[str, Change]


@dataclass(frozen=True)
class Trained:
    """What is known of an adapter.

    :param label: what to call it in messages.
    :param settings: its ``adapter_config.json``.
    :param config: the ``config.json`` beside it; empty when there is none.
    :param stored: the header of its file.
    :param changes: what it changes, by the names where it was trained.
    """

    label: str
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    changes: Mapping[str, Change]


def resolve(
    adapter: Trained, base: str, config: dict[str, Any], architecture: Architecture, room: Collection[str]
) -> Resolved:
    """Find the class, and name what the adapter changes as that class does.

    :param base: the base, for messages.
    :param config, architecture: the base's.
    :param room: the names of the base's tensors.
    :raises UserError: naming the tensors that fit no class, and what would.
    """
    whole, misfits = _fit(adapter, architecture, "", room)
    if not misfits:
        return Resolved(_labelled(adapter, config, architecture), architecture, whole)
    parts = {path: _fit(adapter, architecture, path, room) for path in _parts_of(adapter, architecture)}
    fitting = {path: changes for path, (changes, wrong) in parts.items() if not wrong}
    if len(fitting) > 1:
        raise UserError(
            f"{adapter.label}: its tensors fit {shorten(sorted(fitting))} of {base} alike; say which in its "
            "adapter_config.json, as PEFT does: auto_mapping: {base_model_class: CLASS}"
        )
    for changes in fitting.values():
        return Resolved(config, architecture, changes)
    for name in _classes(adapter, config, architecture):
        for candidate in _configs(adapter, config, name):
            headed = describe(candidate, adapter.label)
            changes, wrong = _fit(adapter, headed, "", headed.slots)
            if not wrong:
                return Resolved(candidate, headed, changes)
            misfits = min(wrong, misfits, key=len)  # of the class that it fits best
    advice = f"is {base} its base? Otherwise name that: BASE+ADAPTER"
    more = [f"{adapter.label}: and {len(misfits) - _MOST_MISFITS} more tensors"] if len(misfits) > _MOST_MISFITS else []
    raise UserError([f"{adapter.label}: {misfit}; {advice}" for misfit in misfits[:_MOST_MISFITS]] + more)


def _labelled(adapter: Trained, config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the base's configuration, with the label names of the one beside the adapter if it has a task's head."""
    labels, ours = adapter.config.get("id2label"), config.get("id2label") or {"0": "", "1": ""}  # two are not written
    if architecture.shared_head or not isinstance(labels, Mapping) or len(labels) != len(ours):
        return config
    return config | {key: adapter.config[key] for key in _LABELS if adapter.config.get(key) is not None}


def _parts_of(adapter: Trained, architecture: Architecture) -> list[str]:
    """Return the paths of the sub-models on which it may have been trained."""
    mapping = adapter.settings.get("auto_mapping")
    wanted = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    known = wanted in architecture.submodels.values()
    return [path for path, kind in architecture.submodels.items() if path and (not known or kind == wanted)]


def _fit(
    adapter: Trained, architecture: Architecture, path: str, room: Collection[str]
) -> tuple[dict[str, Change], list[str]]:
    """Name an adapter's changes as an architecture does, and say what does not fit it.

    :param path: the sub-model that their names start in.
    """
    keys = {f"{path}.{name}" if path else name: name for name in adapter.changes}
    unknown = [key for key in keys if key not in architecture.slots]
    names = {key: (key, key) for key in keys} | (architecture.module_names(unknown) if unknown else {})
    changes: dict[str, Change] = {}
    misfits: list[str] = []
    for key, (name, slot) in names.items():
        change = adapter.changes[keys[key]]
        if slot not in architecture.slots and slot not in room:
            misfits.append(f"tensor '{change.keys[0]}' belongs to no module of {architecture.class_name}")
        elif name != slot:
            misfits.append(f"tensor '{change.keys[0]}' adapts experts that transformers fuses, which cart-hf cannot")
        elif name in changes:
            misfits.append(f"tensors '{changes[name].keys[0]}' and '{change.keys[0]}' are for one place")
        elif slot in architecture.slots:
            place = architecture.slots[slot]
            misfits.extend(
                f"tensor '{key}' is for a module of shape {list(shape)}, but '{slot}' of {architecture.class_name} "
                f"has shape {list(place.shape)}"
                for key, shape in change.shapes(adapter.stored, transposed=place.transposed).items()
                if shape != place.shape
            )
        changes[name] = change
    return changes, misfits


def _classes(adapter: Trained, config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Return the classes that an adapter with a head of its own may have been trained as, the likeliest first."""
    mapping = adapter.settings.get("auto_mapping")
    found = list(adapter.config.get("architectures") or [])[:1]
    if isinstance(mapping, Mapping):
        found.append(mapping.get("base_model_class"))
    if adapter.settings.get("task_type"):
        found.append(task_class(str(config.get("model_type")), str(adapter.settings["task_type"])))
    if not architecture.shared_head:
        found.append(architecture.class_name)
    return list(dict.fromkeys(name for name in found if isinstance(name, str)))


def _configs(adapter: Trained, base: Mapping[str, Any], class_name: str) -> Iterator[dict[str, Any]]:
    """Yield the base's configuration for a class, with each number of labels that its head may have."""
    sizes = {
        adapter.stored[change.replaced].shape[0]
        for name, change in adapter.changes.items()
        if change.replaced is not None and adapter.stored[change.replaced].shape
    }
    labels = adapter.config.get("id2label")
    named = len(labels) if isinstance(labels, Mapping) else 0
    plain = {key: value for key, value in base.items() if key not in _LABELS} | {"architectures": [class_name]}
    for count in sorted(sizes, key=lambda size: (size != named, size)):
        if count == named:
            yield plain | {key: adapter.config[key] for key in _LABELS if adapter.config.get(key) is not None}
        else:
            generic = [f"LABEL_{i}" for i in range(count)]
            yield plain | {
                "id2label": {str(i): name for i, name in enumerate(generic)},
                "label2id": {name: i for i, name in enumerate(generic)},
            }
